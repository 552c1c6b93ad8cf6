"""The resize rule of images, one for training and inference."""

from dataclasses import dataclass
from math import prod

from PIL import Image
from torch import Tensor

from .images import to_pm1, to_rgb

RULES = ("image_transform_args", "vit_image_transform_args")
"""Keys of the resize rules: of the autoencoder's and of the ViT's images."""


@dataclass(frozen=True, kw_only=True)
class ResizeRule:
    """Longer side at most `max_image_size`, shorter at least `min_image_size`, strides of pixels.

    Field names are the keys of `image_transform_args` and `vit_image_transform_args`.
    """

    image_stride: int
    max_image_size: int
    min_image_size: int
    max_pixels: int = 14 * 14 * 9 * 1024

    def __post_init__(self) -> None:
        if not 0 < self.image_stride <= self.min_image_size <= self.max_image_size:
            raise ValueError(
                "image sizes must satisfy 0 < image_stride <= min_image_size <= max_image_size: "
                f"{self}"
            )

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the rule, both multiples of the stride."""
        scale = min(self.max_image_size / max(width, height), 1.0)
        scale = max(scale, self.min_image_size / min(width, height))
        size = self._scaled((width, height), scale)
        if prod(size) > self.max_pixels:
            size = self._scaled(size, self.max_pixels / prod(size))
        if max(size) > self.max_image_size:
            size = self._scaled(size, self.max_image_size / max(size))
        return size

    def _scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        stride = self.image_stride
        width, height = (max(stride, round(side * scale / stride) * stride) for side in size)
        return width, height

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32 in [-1, 1], bicubic with antialias."""
        image = to_rgb(image)
        size = self.size(*image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return to_pm1(image)


NO_IMAGES = ResizeRule(image_stride=1, max_image_size=1, min_image_size=1)
"""Stands where a task has no images of a kind."""
