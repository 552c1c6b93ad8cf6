"""Degradations of cameras and displays: blur, sampling, illumination, stain, compression.

Images are float arrays (H, W) or (H, W, 3) in [0, 1]; results are not clipped.
"""

from io import BytesIO

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import hed_from_rgb, rgb_from_hed
from skimage.transform import resize_local_mean

from data.degradations.registry import Array, Rng, degradation, geometric, linear, severity, stepped
from modeling.geometry import token_grid

CAMERAS = ("SM", "OP", "DX", "US")
ANY = ("MR", "CT", "PT", "NM", *CAMERAS)
GAMMA = 2.2
"""Stored intensity ** GAMMA is light."""
APERTURE_01 = 0.06
"""A fundus camera's surround is darker than this in every channel."""
DARKEST_01 = 1 / 255
"""Optical density is measured down to one grey level."""


@degradation("blur", "deblurring", ANY, "Barrett and Myers 2004", "any")
@severity(sigma_px=linear(0.0, 4.0, "pixels"))
def blur(image_01: Array, sigma_px: float) -> Array:
    """Blur: edges and fine structures are soft.

    Gaussian point spread function of deviation `sigma_px`.
    """
    return ndimage.gaussian_filter(image_01, sigma_px, axes=(0, 1))


def low_resolution(image_01: Array, factor: int) -> Array:
    """Mean over `factor` x `factor` pixels: (H, W) becomes (H / factor, W / factor).

    Raises ValueError when a side is no multiple of `factor`.
    """
    rows, columns = token_grid(image_01.shape[:2], factor)
    blocks = image_01.reshape(rows, factor, columns, factor, *image_01.shape[2:])
    return blocks.mean(axis=(1, 3))


@degradation("downsampling", "super-resolution", ANY, "Greenspan 2009", "any")
@severity(factor=stepped((2, 4, 8), "pixels to one, each axis"))
def downsampling(image_01: Array, factor: int) -> Array:
    """Low resolution: fine structures are missing.

    As `low_resolution`, for any size: sides are divided and rounded.
    """
    size = tuple(max(1, round(n / factor)) for n in image_01.shape[:2])
    return resize_local_mean(image_01, size, channel_axis=2 if image_01.ndim == 3 else None)


@degradation("fundus_illumination", "illumination correction", ("OP",), "Shen et al. 2020", "any")
@severity(light_left=geometric(1.0, 0.03, "share of the light"))
def fundus_illumination(image_01: Array, light_left: float, rng: Rng, spot: float = 0.2) -> Array:
    """Uneven illumination: a part of the retina lies in the dark.

    Light falls off from a place beside the centre as a Gaussian of deviation `spot`, in units of
    the longer side, to `light_left`. The gain acts on light, not on its gamma-coded value.
    """
    height, width = image_01.shape[:2]
    side, angle = max(height, width), rng.uniform(0.0, 2 * np.pi)
    rows = (np.arange(height) - height / 2) / side - 0.25 * np.sin(angle)
    columns = (np.arange(width) - width / 2) / side - 0.25 * np.cos(angle)
    lit = np.exp(-(rows[:, None] ** 2 + columns**2) / (2 * spot**2))
    gain = (light_left + (1 - light_left) * lit) ** (1 / GAMMA)
    return image_01 * (gain if image_01.ndim == 2 else gain[..., None])


@degradation("fundus_blur", "deblurring", ("OP",), "Peli and Peli 1989, Shen et al. 2020", "any")
@severity(
    sigma_percent=linear(0.0, 1.0, "% of the longer side"),
    scatter=linear(0.0, 0.4, "share of the light"),
)
def fundus_blur(image_01: Array, sigma_percent: float, scatter: float) -> Array:
    """Haze and defocus: vessels are soft and pale behind a veil.

    A cataract: Gaussian defocus, and a `scatter` of the light comes from the lens and not from the
    retina. The aperture lies in the camera: its edge stays sharp and its surround dark.
    """
    sigma_px = sigma_percent / 100 * max(image_01.shape[:2])
    brightest = np.atleast_3d(image_01).max(axis=2)
    inside = ndimage.binary_fill_holes(brightest > APERTURE_01).astype(float)
    retina = inside if image_01.ndim == 2 else inside[..., None]
    share = blur(retina, sigma_px).clip(min=np.finfo(float).eps)
    defocused = blur(image_01 * retina, sigma_px) / share
    veil = (image_01 * retina).max()
    return np.where(retina > 0, (1 - scatter) * defocused + scatter * veil, image_01)


@degradation("histology_stain", "stain normalisation", ("SM",), "Tellez et al. 2018", "colour")
@severity(log_gain=linear(0.0, 0.7, "log of the concentration ratio"))
def stain(image_01: Array, log_gain: float, rng: Rng) -> Array:
    """Stain variation: the dyes are too strong or too weak.

    Optical densities are unmixed into haematoxylin, eosin and DAB (Ruifrok and Johnston, 2001) and
    multiplied by exp(g), one g a dye, the largest of them +-`log_gain`. Glass stays clear.
    """
    density = -np.log(np.maximum(image_01, DARKEST_01))
    gains = rng.uniform(-1.0, 1.0, 3)
    gains *= log_gain / np.abs(gains).max()
    dyes = density @ hed_from_rgb
    return image_01 * np.exp(-(dyes * np.expm1(gains)) @ rgb_from_hed)


@degradation("jpeg", "artefact removal", CAMERAS, "Wallace 1991", "any")
@severity(quality=geometric(95.0, 8.0, "JPEG quality, 1 to 100"))
def jpeg(image_01: Array, quality: float) -> Array:
    """Compression: blocks, and ringing around edges."""
    buffer, pixels = BytesIO(), Image.fromarray(np.round(image_01 * 255).astype(np.uint8))
    pixels.save(buffer, "JPEG", quality=round(quality))
    return np.asarray(Image.open(buffer)) / 255.0
