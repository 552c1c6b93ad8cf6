"""The resize rule of images, one for training and inference."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from .images import to_pm1, to_rgb


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
        width, height = self._scaled(width, height, scale)
        if width * height > self.max_pixels:
            width, height = self._scaled(width, height, self.max_pixels / (width * height))
        if max(width, height) > self.max_image_size:
            width, height = self._scaled(width, height, self.max_image_size / max(width, height))
        return width, height

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        stride = self.image_stride
        return (
            max(stride, round(width * scale / stride) * stride),
            max(stride, round(height * scale / stride) * stride),
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32 in [-1, 1], bicubic with antialias."""
        image = to_rgb(image)
        size = self.size(image.width, image.height)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return to_pm1(image)
