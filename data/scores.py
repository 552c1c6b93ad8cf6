"""PSNR and SSIM of two images, and what a restoration is held against."""

import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

from .images import to_image
from .transforms import ResizeRule

PSNR_OF_EQUAL_IMAGES = 999.99
"""Stands for infinity, which JSON does not have."""


PEAK = 255.0
"""Data range of 8-bit images."""


def psnr_db(image: Image.Image, truth: Image.Image, data_range: float = PEAK) -> float:
    """Peak signal-to-noise ratio in dB of two RGB images of one size."""
    a, b = rgb_arrays(image, truth)
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(data_range**2 / error)) if error > 0 else PSNR_OF_EQUAL_IMAGES


def ssim(image: Image.Image, truth: Image.Image) -> float:
    """Structural similarity of two RGB images of one size, sides at least 7."""
    a, b = rgb_arrays(image, truth)
    return float(structural_similarity(a, b, channel_axis=2, data_range=PEAK))


def rgb_arrays(image: Image.Image, truth: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Both as (H, W, 3) uint8. Raises ValueError when their sizes differ."""
    if image.size != truth.size:
        raise ValueError(f"images of {image.size} and {truth.size} cannot be compared")
    return np.asarray(image.convert("RGB")), np.asarray(truth.convert("RGB"))


def scores(image: Image.Image, truth: Image.Image, kind: str = "") -> dict[str, float]:
    """PSNR and SSIM, `kind` appended to their names."""
    return {f"psnr{kind}": psnr_db(image, truth), f"ssim{kind}": ssim(image, truth)}


def references(
    degraded: Image.Image, truth: Image.Image, rule: ResizeRule, size: tuple[int, int]
) -> tuple[Image.Image, Image.Image]:
    """The degraded and the true image, 8-bit RGB, at the (width, height) of a restoration.

    The truth passes the rule that the model's images pass, then both are resampled.
    """
    through_rule = to_image(rule(truth))
    return (
        degraded.resize(size, Image.Resampling.NEAREST),
        through_rule.resize(size, Image.Resampling.BICUBIC),
    )
