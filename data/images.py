"""Image files -> RGB arrays in [0, 1]. PNG and JPEG, 8 and 16 bits, grey, RGB and RGBA."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 20_000_000
"""Larger images are refused before they are decoded."""


class ImageError(ValueError):
    """An image that cannot be read; the message names the file."""


def read_image(path: str | Path | BinaryIO) -> Image.Image:
    """The RGB image of a file, or of one that is open or in memory.

    Raises ImageError for a missing, damaged or oversized file.
    """
    with _opened(path) as image:
        image.load()
        return to_rgb(image)


def image_size(path: str | Path | BinaryIO) -> tuple[int, int]:
    """(width, height) from the header of a file; raises ImageError as `read_image` does."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """The image of a file before its pixels are decoded."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(
                    f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels"
                )
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = "encoded image" if type(path) is BytesIO else path
        raise ImageError(f"{name}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; 16-bit grey is scaled to 8 bits, transparency is laid on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 65535.0
        return Image.fromarray(np.round(grey.clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def to_pm1(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]: mean 0.5, deviation 0.5."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def to_uint8(image_pm1: Tensor) -> np.ndarray:
    """(3, H, W) nominally in [-1, 1] -> (H, W, 3) uint8, clamped and rounded."""
    scaled = (image_pm1.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
