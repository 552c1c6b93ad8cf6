"""Physics of the degradations against independent references, and severity on shipped images."""

from itertools import pairwise

import numpy as np
import pydicom
import pydicom.data
import pytest
from PIL import Image
from scipy import fft
from skimage.color import rgb_from_hed
from skimage.transform import resize

from data.degradations import DEGRADATIONS, degrade, low_resolution, mri, optical, radiation
from data.degradations.radiation import WATER_PER_MM, Calibration
from data.degradations.registry import SEVERITY_WORDS
from scripts.experiments import degradation_sheet as sheet

SEVERITIES = (0.05, 0.25, 0.5, 0.75, 1.0)
BODY = Calibration(hu_low=-1000.0, hu_high=1000.0, pixel_mm=2.0)
WATER_01 = 0.5


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(*shape: int, seed: int = 5) -> np.ndarray:
    return seeded(seed).uniform(0.0, 1.0, shape)


def dicom(name: str) -> np.ndarray:
    pixels = pydicom.dcmread(pydicom.data.get_testdata_file(name, download=False)).pixel_array
    return (pixels - pixels.min()) / np.ptp(pixels).astype(float)


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[np.ndarray]]:
    """Real images by modality; sides are odd, even and unequal."""
    retina = Image.fromarray((sheet.retina() * 255).astype(np.uint8)).resize((211, 211))
    marked = dicom("examples_overlay.dcm")
    return {
        "MR": [sheet.mr(), marked[50:251, 100:300], dicom("MR_small.dcm")],
        "CT": [dicom("CT_small.dcm")[:101, :88]],
        "PT": [sheet.pet()],
        "OP": [np.asarray(retina) / 255.0],
        "SM": [sheet.histology()],
    }


def images_of(shipped: dict[str, list[np.ndarray]], name: str) -> list[np.ndarray]:
    return [i for m in DEGRADATIONS[name].modalities for i in shipped.get(m, [])]


def psnr(found: np.ndarray, target: np.ndarray) -> float:
    if found.shape != target.shape:
        found = resize(found, target.shape, order=3, mode="edge", anti_aliasing=False)
    return float(-10 * np.log10(np.mean((found - target) ** 2)))


# k-space


def lines_left(image: np.ndarray, degraded: np.ndarray) -> np.ndarray:
    """(H,) how much of each line is left; the first axis in order of `np.fft.fftfreq`."""
    before, after = np.fft.fft2(image), np.fft.fft2(degraded)
    return np.real((after * before.conj())[:, 1:].sum(1) / (np.abs(before) ** 2)[:, 1:].sum(1))


def faint(shape: tuple[int, int]) -> np.ndarray:
    """A magnitude of it is the real part but for terms of 1e-6, so its k-space can be looked at."""
    return 0.5 + 1e-3 * (noise(*shape) - 0.5)


@pytest.mark.parametrize("height", [64, 65])
def test_undersampling_keeps_measured_lines_and_removes_the_others(height):
    image = faint((height, 48))
    mask = mri.cartesian_mask(height, 3.0, 0.1, seeded())
    left = lines_left(image, mri.undersampling(image, 3.0, 0.1, seeded()))
    kept = np.fft.ifftshift(mask).astype(float)
    mirrored = kept[-np.arange(height) % height]
    assert mask.sum() == round(height / 3)
    np.testing.assert_allclose(left, (kept + mirrored) / 2, atol=2e-3)


def test_energy_removed_is_the_share_of_the_mask():
    image = noise(256, 192)
    spectrum_energy = (np.abs(np.fft.fft2(image)) ** 2).sum(1) / image.size
    mask = np.fft.ifftshift(mri.cartesian_mask(256, 4.0, 0.08, seeded(1)))
    degraded = mri.undersampling(image, 4.0, 0.08, seeded(1))
    removed = (image**2).sum() - (degraded**2).sum()
    np.testing.assert_allclose(removed, spectrum_energy[~mask].sum(), rtol=1e-10)
    # White noise has the same energy in each line, but for its mean.
    white = image.var() * image.size
    np.testing.assert_allclose(removed / white, 1 - mask.mean(), rtol=0.02)


def test_masks_are_nested_and_hold_the_centre():
    masks = [
        mri.cartesian_mask(201, p["acceleration"], p["centre_fraction"], seeded(3))
        for p in map(DEGRADATIONS["mri_undersampling"].parameters, SEVERITIES)
    ]
    for more, fewer in pairwise(masks):
        assert fewer.sum() < more.sum() and not (fewer & ~more).any()
    assert all(m[96:104].all() for m in masks)


def test_partial_fourier_keeps_one_half():
    image = faint((64, 40))
    left = lines_left(image, mri.partial_fourier(image, 0.125))
    frequency = np.abs(np.fft.fftfreq(64) * 64)
    # The real part has half of a line whose mirror image is missing; line 32 is its own.
    expected = np.where((frequency < 8) | (frequency == 32), 1.0, 0.5)
    np.testing.assert_allclose(left, expected, atol=2e-3)


class Drawn:
    """A generator whose normal numbers are known."""

    def __init__(self, poses: list[list[float]]) -> None:
        self.poses = np.array(poses, dtype=float)

    def standard_normal(self, shape: tuple[int, int]) -> np.ndarray:
        assert shape == self.poses.shape
        return self.poses


def mixed_lines(moved: np.ndarray, still: np.ndarray) -> np.ndarray:
    """Negative frequencies from one image, the others from another."""
    negative = np.fft.fftfreq(len(moved)) < 0
    spectrum = np.where(negative[:, None], np.fft.fft2(moved), np.fft.fft2(still))
    return np.abs(np.fft.ifft2(spectrum))


def test_motion_takes_lines_from_the_moved_image():
    image = np.zeros((64, 64))
    image[16:48, 16:48] = noise(32, 32)
    three_px = 100 * 3 / 64 / np.sqrt(2)
    shifted = mri.motion(image, three_px, 0.0, Drawn([[1, -2, 1], [0, 0, 0]]), shots=2)
    expected = mixed_lines(np.roll(image, (3, -3), (0, 1)), image)
    np.testing.assert_allclose(shifted, expected, atol=1e-10)
    turned = mri.motion(image, 0.0, 90 / np.sqrt(2), Drawn([[1, 1, 3], [0, 0, 0]]), shots=2)
    np.testing.assert_allclose(turned, mixed_lines(np.rot90(image), image), atol=1e-10)


def test_motion_has_the_amplitude_that_it_says_and_shifts_keep_energy():
    image = noise(60, 50)
    moved = mri.motion(image, 2.0, 0.0, seeded())
    np.testing.assert_allclose((moved**2).sum(), (image**2).sum(), rtol=1e-10)
    np.testing.assert_allclose(mri.motion(image, 2.0, 3.0, seeded(), shots=1), image, atol=1e-12)


def test_gibbs_overshoots_by_nine_per_cent_of_the_jump():
    image = np.full((2048, 16), 0.25)
    image[512:1536] = 0.75
    overshoot = (mri.gibbs(image, 1 / 16).max() - 0.75) / 0.5
    assert overshoot == pytest.approx(0.0895, abs=0.001)


def test_gibbs_removes_the_outer_frequencies_alone():
    image = faint((60, 45))
    after = np.fft.fft2(mri.gibbs(image, 0.4)) / np.fft.fft2(image)
    rows, columns = np.abs(np.fft.fftfreq(60)), np.abs(np.fft.fftfreq(45))
    inside = (rows[:, None] <= 0.2 + 1e-9) & (columns <= 0.2 + 1e-9)
    np.testing.assert_allclose(after, inside, atol=1e-9)


def test_rician_noise_without_and_with_signal():
    sigma, pixels = 0.1, (400, 500)
    empty = mri.rician_noise(np.zeros(pixels), sigma, seeded())
    assert empty.mean() == pytest.approx(sigma * np.sqrt(np.pi / 2), rel=5e-3)
    assert empty.var() == pytest.approx(sigma**2 * (2 - np.pi / 2), rel=0.02)
    bright = mri.rician_noise(np.full(pixels, 0.5), 0.05, seeded())
    assert (bright**2).mean() == pytest.approx(0.5**2 + 2 * 0.05**2, rel=2e-3)


def test_bias_field_is_smooth_and_spans_what_it_says():
    gain = mri.bias_field(np.ones((40, 56)), 0.6, seeded())
    assert (gain.min(), gain.max()) == pytest.approx((0.4, 1.0))
    waves = np.abs(fft.dctn(gain))
    assert waves[:3, :3].max() > 1 and waves[3:].max() < 1e-9 and waves[:, 3:].max() < 1e-9
    image = noise(40, 56)
    np.testing.assert_allclose(mri.bias_field(image, 0.6, seeded()), gain * image)


# CT and PET


def water_disc(side: int, radius: float) -> np.ndarray:
    rows, columns = np.indices((side, side)) - side // 2
    return np.where(np.hypot(rows, columns) <= radius, WATER_01, 0.0)


def test_line_integrals_of_a_disc_of_water():
    sinogram = radiation.project(water_disc(129, 50.0), BODY, 12)
    offset = np.arange(len(sinogram)) - len(sinogram) // 2
    chord_mm = 2 * np.sqrt(np.maximum(50.0**2 - offset**2, 0)) * BODY.pixel_mm
    inside = np.abs(offset) < 45
    expected = WATER_PER_MM * chord_mm[inside, None]
    np.testing.assert_allclose(sinogram[inside], expected.repeat(12, 1), rtol=0.03)


def test_back_projection_gives_intensity_back():
    disc = water_disc(129, 50.0)
    found = radiation.back_project(radiation.project(disc, BODY, 240), BODY, (129, 129))
    centre = np.s_[40:90, 40:90]
    np.testing.assert_allclose(found[centre], disc[centre], rtol=0.02)


def test_back_projection_of_a_wide_image_is_in_place():
    wide = np.zeros((60, 101))
    wide[20:30, 70:85] = 0.6
    found = radiation.back_project(radiation.project(wide, BODY, 240), BODY, wide.shape)
    rows, columns = np.indices(wide.shape)
    for axis in (rows, columns):
        assert (axis * found).sum() / found.sum() == pytest.approx(axis[wide > 0].mean(), abs=0.3)


@pytest.mark.parametrize("photons", [2e4, 8e4, 3.2e5, 1.28e6])
def test_sinogram_noise_variance_falls_with_dose(photons):
    path, electronic = 2.0, 30.0
    rays = np.full(200_000, path)
    counts = photons * np.exp(-path)
    variance = radiation.measured(rays, photons, seeded(), electronic_noise=0.0).var()
    four_times = radiation.measured(rays, 4 * photons, seeded(1), electronic_noise=0.0).var()
    sampling_error = 4 * np.sqrt(2 * 2 / rays.size)
    assert variance * counts == pytest.approx(1.0, rel=sampling_error + 1 / counts)
    assert variance / four_times == pytest.approx(4.0, rel=sampling_error + 2 / counts)
    noisy = radiation.measured(rays, photons, seeded(2), electronic_noise=electronic).var()
    expected = (1 + electronic**2 / counts) / counts
    assert noisy == pytest.approx(expected, rel=sampling_error + 8 * expected)


def test_image_noise_variance_falls_with_dose():
    disc = water_disc(96, 40.0)
    deviations = [
        (radiation.low_dose(disc, photons, BODY, seeded()) - disc)[30:66, 30:66].std()
        for photons in (1e6, 4e6, 1.6e7)
    ]
    np.testing.assert_allclose(np.divide(deviations[:-1], deviations[1:]), 2.0, rtol=0.05)


def test_noise_does_not_move_hounsfield_units():
    disc = water_disc(96, 40.0)
    error = radiation.low_dose(disc, 1e5, BODY, seeded()) - disc
    assert abs(error[30:66, 30:66].mean()) < 3 * error.std() / 36
    assert error[30:66, 30:66].std() * 2000 > 5


def test_a_starved_detector_saturates():
    seen = radiation.measured(np.array([50.0, 80.0]), 1e5, seeded(), electronic_noise=0.0)
    np.testing.assert_allclose(seen, np.log(1e5))


def test_all_views_add_no_streaks_and_fewer_add_more():
    disc = water_disc(64, 20.0)
    np.testing.assert_allclose(radiation.sparse_views(disc, 240, BODY), disc, atol=1e-12)
    errors = [np.std(radiation.sparse_views(disc, v, BODY) - disc) for v in (120, 60, 40, 24)]
    assert errors == sorted(errors) and errors[0] > 1e-4
    with pytest.raises(ValueError, match="views 100 must divide 240"):
        radiation.sparse_views(disc, 100, BODY)


def test_metal_stays_white_and_darkens_what_lies_between_two_rods():
    disc = water_disc(128, 50.0)
    drawn = np.argwhere(disc > 0.4)
    centres = (drawn == (64, 40)).all(1).argmax(), (drawn == (64, 88)).all(1).argmax()

    class Placed:
        def __init__(self) -> None:
            self.poisson, self.standard_normal = seeded().poisson, seeded().standard_normal

        def integers(self, high: int, size: int) -> np.ndarray:
            assert (high, size) == (len(drawn), 2)
            return np.array(centres)

    streaked, target = radiation.metal(disc, 10.0, BODY, Placed())
    rods = target == 1.0
    # A pixel that is iron in part is white too.
    assert 2 * np.pi * 5.0**2 < rods.sum() < 2 * np.pi * 6.0**2
    assert rods[64, 40] and rods[64, 88] and (streaked[rods] > 1.0).all()
    away = np.abs(np.arange(128) - 64) > 12
    np.testing.assert_array_equal(target[away], disc[away])
    error = (streaked - target)[64]
    assert error[52:77].max() < -0.1
    assert abs((streaked - target)[:40, 54:74].mean()) < 0.05


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.02])
def test_thinned_counts_have_the_mean_and_variance_of_poisson_thinning(fraction):
    peak, level = 1000.0, 0.4
    image = np.full((300, 300), level)
    found = radiation.low_count(image, fraction, seeded(), peak_counts=peak, filter_px=0.0)
    kept = found * peak * fraction
    counts = level * peak
    variance = counts * fraction * (1 - fraction)
    assert kept.mean() == pytest.approx(counts * fraction, abs=4 * np.sqrt(variance / image.size))
    assert kept.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / image.size) + 0.005)
    assert np.allclose(kept, np.round(kept))


def test_thinning_poisson_counts_leaves_poisson_counts():
    rng = seeded()
    counts = rng.poisson(200.0, (300, 300)) / 500.0
    kept = radiation.low_count(counts, 0.1, rng, peak_counts=500.0, filter_px=0.0) * 50
    assert kept.mean() == pytest.approx(20.0, rel=0.01)
    assert kept.var() == pytest.approx(20.0, rel=0.03)


def test_the_post_filter_smooths_noise_and_not_the_image():
    image = np.zeros((256, 256))
    image[20:236, 20:236] = 0.5
    unfiltered, filtered = (
        radiation.low_count(image, 0.1, seeded(), filter_px=width) - image for width in (0.0, 4.0)
    )
    assert filtered.sum() == pytest.approx(unfiltered.sum(), rel=1e-9)
    sigma = 4.0 / np.sqrt(8 * np.log(2))
    # A Gaussian of deviation s averages over 4 pi s^2 pixels.
    ratio = unfiltered[40:216, 40:216].var() / filtered[40:216, 40:216].var()
    assert ratio == pytest.approx(4 * np.pi * sigma**2, rel=0.1)


# cameras and displays


def test_blur_has_the_width_that_it_says():
    point = np.zeros((101, 101, 3))
    point[50, 50] = 1.0
    spread = optical.blur(point, 3.0)
    offset = np.arange(101) - 50
    for profile in (spread[..., 1].sum(0), spread[..., 2].sum(1)):
        assert (offset**2 * profile).sum() == pytest.approx(9.0, rel=5e-3)
    np.testing.assert_allclose(spread.sum((0, 1)), 1.0, rtol=1e-4)


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 3), (51, 77), (37, 101, 3)])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_downsampling_preserves_the_mean(shape, factor):
    image = noise(*shape)
    small = optical.downsampling(image, factor)
    assert small.shape == (round(shape[0] / factor), round(shape[1] / factor), *shape[2:])
    np.testing.assert_allclose(small.mean((0, 1)), image.mean((0, 1)), rtol=1e-9)
    if not (shape[0] % factor or shape[1] % factor):
        np.testing.assert_allclose(small, low_resolution(image, factor), atol=1e-12)


def test_illumination_acts_on_light():
    image = np.full((120, 160, 3), 0.8)
    light = (optical.fundus_illumination(image, 0.1, seeded()) / 0.8) ** optical.GAMMA
    assert light.max() == pytest.approx(1.0, abs=1e-3)
    assert light.min() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_allclose(
        optical.fundus_illumination(image[..., 0], 0.1, seeded()) / 0.8,
        light[..., 0] ** (1 / optical.GAMMA),
    )


def test_haze_lowers_contrast_inside_the_aperture_alone():
    image = np.zeros((100, 100, 3))
    image[20:80, 20:80] = 0.4
    image[20:80, 50:80] = 0.8
    hazy = optical.fundus_blur(image, 1.0, 0.25)
    inside = image[..., 0] > 0
    np.testing.assert_array_equal(hazy[~inside], 0.0)
    np.testing.assert_allclose(hazy[25:75, 25], 0.75 * 0.4 + 0.25 * 0.8, atol=1e-6)
    np.testing.assert_allclose(hazy[20, 79], 0.8, atol=1e-6)
    steps = np.diff(hazy[50, 40:60, 0])
    assert (steps >= 0).all() and steps.max() < 0.75 * 0.4 * 0.5


def test_stain_multiplies_the_density_of_each_dye():
    amounts = noise(20, 30, 3) * 0.5 + 0.05
    image = np.exp(-amounts @ rgb_from_hed)
    stained = -np.log(optical.stain(image, 0.5, seeded())) @ np.linalg.inv(rgb_from_hed)
    gains = np.log(stained / amounts).reshape(-1, 3)
    np.testing.assert_allclose(gains, gains[:1].repeat(len(gains), 0), atol=1e-9)
    assert np.abs(gains[0]).max() == pytest.approx(0.5) and np.unique(gains[0]).size == 3
    glass = np.ones((4, 4, 3))
    np.testing.assert_allclose(optical.stain(glass, 0.5, seeded()), glass)


def test_jpeg_at_low_quality_leaves_flat_blocks():
    image = 0.5 + 0.02 * (noise(64, 64) - 0.5)
    coarse = optical.jpeg(image, 8.0).reshape(8, 8, 8, 8)
    assert np.ptp(coarse, axis=(1, 3)).max() == 0.0
    assert np.abs(optical.jpeg(image, 95.0) - image).max() < 0.02


# every entry


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_severity_is_monotone_on_real_images(name, shipped):
    stepped = len({str(DEGRADATIONS[name].parameters(s)) for s in SEVERITIES}) < len(SEVERITIES)
    images = images_of(shipped, name)
    assert images
    for image in images:
        for seed in (0, 1) if "rng" in DEGRADATIONS[name].apply.__annotations__ else (0,):
            results = [degrade(name, image, s, seeded(seed)) for s in SEVERITIES]
            values = [psnr(r.image_01, r.target_01) for r in results]
            assert values == sorted(values, reverse=True), (seed, values)
            assert stepped or len(set(values)) == len(values), values
            assert values[0] > values[-1] + 3


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_contract_of_every_entry(name, shipped):
    entry = DEGRADATIONS[name]
    image = images_of(shipped, name)[-1].astype(np.float32)
    before = image.copy()
    first, second = (degrade(name, image, 0.7, seeded(4)) for _ in range(2))
    np.testing.assert_array_equal(first.image_01, second.image_01)
    np.testing.assert_array_equal(image, before)
    assert first.image_01.dtype == np.float32
    assert first.image_01.min() >= 0.0 and first.image_01.max() <= 1.0
    assert first.target_01.shape == image.shape
    assert first.image_01.shape == image.shape or name == "downsampling"
    assert (first.parameters, first.task) == (second.parameters, entry.task)
    assert first.parameters.items() >= entry.parameters(0.7).items()
    what, _, _ = first.sentence.partition(",")
    assert first.sentence.startswith(f"{what}, strong: ") and first.sentence.endswith(".")
    assert entry.name == name and entry.reference[-4:].isdigit() and entry.modalities
    if "rng" in entry.apply.__annotations__:
        assert not np.array_equal(degrade(name, image, 0.7, seeded(5)).image_01, first.image_01)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_parameters_are_monotone(name):
    for parameter in DEGRADATIONS[name].varying.values():
        steps = np.diff([parameter.at(s) for s in np.linspace(1e-6, 1.0, 50)])
        assert (steps >= 0).all() or (steps <= 0).all()
        assert steps.any()


def test_severity_words_share_the_range():
    entry = DEGRADATIONS["mri_gibbs"]
    for edge, (word, after) in zip((0.25, 0.5, 0.75), pairwise(SEVERITY_WORDS), strict=True):
        assert entry.sentence(edge).startswith(f"Gibbs ringing, {word}: ")
        assert entry.sentence(edge + 1e-9).startswith(f"Gibbs ringing, {after}: ")


def test_grey_with_three_channels_is_grey():
    grey = noise(40, 40)
    rgb = np.repeat(grey[..., None], 3, 2)
    for name in ("mri_motion", "ct_low_dose", "pet_low_count"):
        found = degrade(name, rgb, 0.5, seeded()).image_01
        np.testing.assert_array_equal(found[..., 2], degrade(name, grey, 0.5, seeded()).image_01)


def test_ct_calibration_is_used_and_recorded():
    disc, centre = water_disc(129, 40.0), np.s_[56:73, 56:73]
    small, large = (
        degrade("ct_low_dose", disc, 0.01, seeded(), pixel_mm=side) for side in (0.5, 5.0)
    )
    assert small.parameters["pixel_mm"] == 0.5 and large.parameters["hu_low"] == -1000.0
    # Counts fall with exp(path); an error of the line integral is shared by wider pixels.
    expected = np.exp(WATER_PER_MM * 80 * (5.0 - 0.5) / 2) / (5.0 / 0.5)
    ratio = (large.image_01 - disc)[centre].std() / (small.image_01 - disc)[centre].std()
    assert ratio == pytest.approx(expected, rel=0.15)
    wide = degrade("ct_low_dose", disc / 2, 0.01, seeded(), hu_range=(-1000, 3000), pixel_mm=5.0)
    error = (wide.image_01 - disc / 2)[centre]
    np.testing.assert_allclose(error, (large.image_01 - disc)[centre] / 2, atol=1e-9)


@pytest.mark.parametrize("severity", [0.0, -0.1, 1.0001, float("nan")])
def test_severity_outside_is_refused(severity):
    with pytest.raises(ValueError, match=r"mri_noise: severity .* must be above 0 and at most 1"):
        degrade("mri_noise", noise(8, 8), severity, seeded())


def test_wrong_names_and_images_are_refused():
    with pytest.raises(ValueError, match="'mri_nois'; the nearest is 'mri_noise'"):
        degrade("mri_nois", noise(8, 8), 0.5, seeded())
    broken = noise(8, 8)
    broken[0, 0] = np.nan
    for image in (broken, noise(8, 8) + 0.5, (noise(8, 8) * 255).astype(np.uint8)):
        with pytest.raises(ValueError, match=r"blur: image is .* must be float in \[0, 1\]"):
            degrade("blur", image, 0.5, seeded())
    for shape in ((8,), (8, 8, 4), (2, 8, 8, 3), (0, 8)):
        with pytest.raises(ValueError, match=r"blur: image \(.*\) must be \(H, W\) or"):
            degrade("blur", noise(*shape), 0.5, seeded())
    for wrong in ({"hu_range": (200.0, -200.0)}, {"pixel_mm": 0.0}, {"pixel_mm": float("nan")}):
        with pytest.raises(ValueError, match="hu_range must rise and pixel_mm be positive"):
            degrade("ct_low_dose", noise(8, 8), 0.5, seeded(), **wrong)
    with pytest.raises(ValueError, match="mri_noise: needs a grey image"):
        degrade("mri_noise", noise(8, 8, 3), 0.5, seeded())
    with pytest.raises(ValueError, match="histology_stain: needs a colour image"):
        degrade("histology_stain", noise(8, 8), 0.5, seeded())


def test_the_page_shows_the_table_and_every_picture():
    folder = sheet.ROOT / "docs"
    page = (folder / "degradations.md").read_text()
    assert page.split(sheet.MARKS[0])[1].split(sheet.MARKS[1])[0] == sheet.table()
    for name in DEGRADATIONS:
        assert f"(degradations/{name}.jpg)" in page
        assert Image.open(folder / "degradations" / f"{name}.jpg").width > 600
