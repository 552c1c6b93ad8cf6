"""Degradations of magnetic resonance images, in k-space where they arise.

Images are float arrays (H, W) in [0, 1]. The spectrum is centred and orthonormal: its energy is
the image's (Parseval), its row H // 2 the zero frequency. Rows are phase-encoding lines, so
undersampling and motion spread along the columns. Results are magnitudes, not clipped.
"""

import numpy as np
from scipy import ndimage

from data.degradations.registry import Array, Rng, degradation, geometric, linear, severity

MR = ("MR",)


def kspace(image: Array) -> Array:
    """Complex (H, W) spectrum of a real or complex image."""
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image), norm="ortho"))


def magnitude(spectrum: Array) -> Array:
    """(H, W) >= 0: modulus of the image of a spectrum."""
    return np.abs(np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(spectrum), norm="ortho")))


def cartesian_mask(lines: int, acceleration: float, centre_fraction: float, rng: Rng) -> Array:
    """(lines,) True where a line is measured: `lines` / `acceleration` of them.

    The central `centre_fraction` of all lines is always measured, the rest is drawn uniformly.
    With the same generator state, a higher acceleration and a narrower centre measure a part of
    what the lower ones do.
    """
    kept = max(1, round(lines / acceleration))
    centre = min(kept, max(1, round(lines * centre_fraction)))
    mask = np.zeros(lines, dtype=bool)
    start = lines // 2 - centre // 2
    mask[start : start + centre] = True
    order = rng.permutation(lines)
    mask[order[~mask[order]][: kept - centre]] = True
    return mask


@degradation("mri_undersampling", "reconstruction", MR, "Zbontar et al. 2018")
@severity(
    acceleration=geometric(1.0, 8.0, "all lines / measured lines"),
    centre_fraction=geometric(0.32, 0.04, "share of the lines"),
)
def undersampling(image_01: Array, acceleration: float, centre_fraction: float, rng: Rng) -> Array:
    """Undersampling: aliasing along the phase-encoding direction hides fine structures.

    Zero-filled reconstruction of the lines of `cartesian_mask`.
    """
    mask = cartesian_mask(image_01.shape[0], acceleration, centre_fraction, rng)
    return magnitude(kspace(image_01) * mask[:, None])


@degradation("mri_partial_fourier", "reconstruction", MR, "McGibney et al. 1993")
@severity(beyond_half=geometric(0.5, 0.02, "share of the lines"))
def partial_fourier(image_01: Array, beyond_half: float) -> Array:
    """Partial Fourier blur: edges are smeared along the phase-encoding direction.

    Zero-filled reconstruction of one half of k-space and of a share `beyond_half` of all lines.
    """
    lines = image_01.shape[0]
    mask = np.arange(lines) < max(lines // 2 + 1, round((0.5 + beyond_half) * lines))
    return magnitude(kspace(image_01) * mask[:, None])


@degradation("mri_motion", "motion correction", MR, "Batchelor et al. 2005, Shaw et al. 2019")
@severity(
    shift_percent=linear(0.0, 3.0, "% of the field of view"),
    rotation_deg=linear(0.0, 4.0, "degrees"),
)
def motion(
    image_01: Array, shift_percent: float, rotation_deg: float, rng: Rng, shots: int = 15
) -> Array:
    """Motion: ghosts repeat the edges along the phase-encoding direction.

    Each of `shots` groups of neighbouring lines comes from a rigidly moved image. The shift along
    each axis and the rotation have these root mean squares over the shots. The shot that holds the
    zero frequency does not move, so that the image stays aligned with the clean one.
    """
    groups = np.array_split(np.arange(len(image_01)), min(shots, len(image_01)))
    poses = rng.standard_normal((len(groups), 3))
    poses -= poses[[len(image_01) // 2 in lines for lines in groups]]
    poses /= np.sqrt(np.mean(poses**2, axis=0)).clip(min=np.finfo(float).tiny)
    rows, columns = (np.arange(n) - n // 2 for n in image_01.shape)
    spectrum = np.empty(image_01.shape, dtype=complex)
    for lines, (down, right, turn) in zip(groups, poses, strict=True):
        turned = ndimage.rotate(image_01, rotation_deg * turn, reshape=False, order=1)
        cycles = shift_percent / 100 * (down * rows[lines, None] + right * columns)
        spectrum[lines] = kspace(turned)[lines] * np.exp(-2j * np.pi * cycles)
    return magnitude(spectrum)


@degradation("mri_gibbs", "artefact removal", MR, "Czervionke et al. 1988")
@severity(kept_fraction=geometric(1.0, 0.25, "share of each axis of k-space"))
def gibbs(image_01: Array, kept_fraction: float) -> Array:
    """Gibbs ringing: parallel lines beside sharp edges.

    The central `kept_fraction` of both axes of k-space, filled with zeros to its size.
    """
    rows, columns = (np.abs(np.arange(n) - n // 2) <= kept_fraction * n / 2 for n in image_01.shape)
    return magnitude(kspace(image_01) * (rows[:, None] & columns))


@degradation("mri_noise", "denoising", MR, "Gudbjartsson and Patz 1995")
@severity(sigma=linear(0.0, 0.2, "intensity range"))
def rician_noise(image_01: Array, sigma: float, rng: Rng) -> Array:
    """Rician noise: grain in the tissue and a raised background.

    Magnitude of a complex image with Gaussian noise of deviation `sigma`, in units of the intensity
    range, on both channels. Without signal it follows a Rayleigh distribution with mean
    sigma * sqrt(pi / 2), the noise floor of magnitude MRI. Any shape; clipped to [0, 1].
    """
    real = image_01 + sigma * rng.standard_normal(image_01.shape)
    imaginary = sigma * rng.standard_normal(image_01.shape)
    return np.clip(np.hypot(real, imaginary), 0.0, 1.0)


@degradation("mri_bias_field", "bias correction", MR, "Ashburner and Friston 2005")
@severity(loss=linear(0.0, 0.8, "share of the signal"))
def bias_field(image_01: Array, loss: float, rng: Rng, order: int = 2) -> Array:
    """Bias field: the same tissue is bright on one side and dark on the other.

    A smooth gain between 1 and 1 - `loss`: a random sum of the cosines up to `order` half periods
    along each axis. Where the coil is nearest the intensity stays, so nothing saturates.
    """
    weights = rng.standard_normal((order + 1, order + 1))
    weights[0, 0] = 0.0
    row_waves, column_waves = (
        np.cos(np.pi * np.outer(np.arange(order + 1), (np.arange(n) + 0.5) / n))
        for n in image_01.shape
    )
    field = row_waves.T @ weights @ column_waves
    return image_01 * (1 - loss * (field.max() - field) / np.ptp(field))
