"""Degradations of images made of counted photons: CT in the sinogram, PET in its counts.

Images are float arrays (H, W) in [0, 1], results are not clipped. Around a CT image is air. Only
the error passes filtered back-projection and is added to the image, so nothing else is lost.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.transform import iradon, radon

from data.degradations.registry import Array, Rng, degradation, geometric, linear, severity, stepped

CT = ("CT",)
WATER_PER_MM = 0.0193
"""Attenuation of water at 70 keV (NIST XCOM)."""
IRON_PER_MM = 0.65
"""Attenuation of iron at 70 keV (NIST XCOM)."""
TISSUE_HU = -200.0
"""Implants lie in what attenuates more than this."""
ELECTRONIC_NOISE = 5.0
"""Deviation in counts."""
VIEWS = 240
"""Angles in half a turn; all time goes into them."""
FWHM_PER_SIGMA = float(np.sqrt(8 * np.log(2)))


@dataclass(frozen=True)
class Calibration:
    """What a CT image stands for: Hounsfield units of 0 and 1, side of a pixel in millimetres."""

    hu_low: float
    hu_high: float
    pixel_mm: float

    def __post_init__(self) -> None:
        if not (self.hu_low < self.hu_high and self.pixel_mm > 0.0):
            raise ValueError(f"hu_range must rise and pixel_mm be positive: {self}")

    def hounsfield(self, image_01: Array) -> Array:
        return self.hu_low + image_01 * (self.hu_high - self.hu_low)


def project(image_01: Array, calibration: Calibration, views: int) -> Array:
    """(detectors, views) line integrals in nepers over half a turn."""
    relative = np.maximum(0.0, 1.0 + calibration.hounsfield(image_01) / 1000.0)
    nepers = WATER_PER_MM * calibration.pixel_mm * relative
    angles = np.linspace(0.0, 180.0, views, endpoint=False)
    return radon(nepers, angles, circle=False, preserve_range=True)


def back_project(sinogram: Array, calibration: Calibration, shape: tuple[int, ...]) -> Array:
    """Filtered back-projection of a change of (detectors, views) nepers to one of intensity.

    The Hann window keeps the lower half of the frequencies, as kernels for soft tissue do.
    """
    side = max(shape)
    square = iradon(sinogram, filter_name="hann", circle=False, output_size=side)
    top, left = (side // 2 - n // 2 for n in shape)
    nepers = square[top : top + shape[0], left : left + shape[1]]
    hounsfield = nepers / (WATER_PER_MM * calibration.pixel_mm) * 1000.0
    return hounsfield / (calibration.hu_high - calibration.hu_low)


def measured(
    line_integrals: Array, photons: float, rng: Rng, electronic_noise: float = ELECTRONIC_NOISE
) -> Array:
    """Line integrals as a detector sees them, in nepers.

    `photons` * exp(-line integral) arrive on average (Beer-Lambert), a Poisson number is counted,
    Gaussian noise of deviation `electronic_noise` (in counts) is added, the logarithm taken. The
    detector saturates where less than one count is left.
    """
    counts = rng.poisson(photons * np.exp(-line_integrals)).astype(float)
    counts += electronic_noise * rng.standard_normal(counts.shape)
    return np.log(photons / np.maximum(counts, 1.0))


@degradation("ct_low_dose", "denoising", CT, "Zeng et al. 2015, Leuschner et al. 2021")
@severity(photons=geometric(1e7, 2e4, "photons a ray"))
def low_dose(
    image_01: Array, photons: float, calibration: Calibration, rng: Rng, views: int = VIEWS
) -> Array:
    """Low-dose noise: grain, and fine streaks along the strongest attenuation.

    The image counts as free of noise; what is added falls as 1 / sqrt(`photons` * `views`).
    """
    true = project(image_01, calibration, views)
    noise = measured(true, photons, rng) - true
    return image_01 + back_project(noise, calibration, image_01.shape)


@degradation("ct_sparse_views", "reconstruction", CT, "Sidky et al. 2006, Jin et al. 2017")
@severity(views=stepped((120, 80, 60, 40), "angles in half a turn"))
def sparse_views(image_01: Array, views: int, calibration: Calibration, of: int = VIEWS) -> Array:
    """Sparse-view streaks: straight lines in all directions from dense edges.

    The error of `views` angles against `of`; ValueError where they do not divide `of`.
    """
    if of % views:
        raise ValueError(f"views {views} must divide {of}")
    full = project(image_01, calibration, of)
    sparse_01 = back_project(full[:, :: of // views], calibration, image_01.shape)
    return image_01 + sparse_01 - back_project(full, calibration, image_01.shape)


@degradation("ct_metal", "metal artefact reduction", CT, "De Man et al. 1999, Zhang and Yu 2018")
@severity(radius_mm=linear(1.0, 5.0, "mm"))
def metal(
    image_01: Array,
    radius_mm: float,
    calibration: Calibration,
    rng: Rng,
    implants: int = 2,
    photons: float = 1e6,
    views: int = VIEWS,
) -> tuple[Array, Array]:
    """Metal artefacts: bright and dark streaks from an implant.

    Iron rods at right angles to the slice; the second image is the target, with the rods and
    without streaks. Few photons pass a rod, none several in line: noise, and a beam that saturates.
    """
    tissue = calibration.hounsfield(image_01) > TISSUE_HU
    share = _discs(tissue, radius_mm / calibration.pixel_mm, implants, rng)
    iron_hu = 1000.0 * (IRON_PER_MM / WATER_PER_MM - 1.0)
    iron_01 = (iron_hu - calibration.hu_low) / (calibration.hu_high - calibration.hu_low)
    with_rods = image_01 * (1 - share) + iron_01 * share
    true = project(with_rods, calibration, views)
    error = back_project(measured(true, photons, rng) - true, calibration, image_01.shape)
    return with_rods + error, np.minimum(with_rods, 1.0)


def _discs(allowed: Array, radius_px: float, count: int, rng: Rng) -> Array:
    """(H, W) share of each pixel that discs cover; their centres are drawn where allowed."""
    places = np.argwhere(allowed if allowed.any() else np.ones_like(allowed))
    rows, columns = np.indices(allowed.shape)
    centres = places[rng.integers(len(places), size=count)]
    distance = np.min([np.hypot(rows - i, columns - j) for i, j in centres], axis=0)
    return np.clip(radius_px + 0.5 - distance, 0.0, 1.0)


@degradation("pet_low_count", "denoising", ("PT", "NM"), "Xu et al. 2017")
@severity(dose=geometric(1.0, 0.01, "share of the events"))
def low_count(
    image_01: Array, dose: float, rng: Rng, peak_counts: float = 400.0, filter_px: float = 2.5
) -> Array:
    """Low-count noise: blotches that grow with the uptake.

    An intensity of 1 stands for `peak_counts` events a pixel at full dose; each is kept with
    probability `dose`, so Poisson stays Poisson. The noise passes a Gaussian post-filter
    of `filter_px` full width at half maximum; the image has passed it.
    """
    counts = np.round(image_01 * peak_counts).astype(np.int64)
    noise = (rng.binomial(counts, dose) / dose - counts) / peak_counts
    return image_01 + ndimage.gaussian_filter(noise, filter_px / FWHM_PER_SIGMA)
