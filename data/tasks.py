"""Record -> segments: the one place that says how a sample is laid out.

Training and inference use the same object, so a prompt cannot differ between them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .config import RULES
from .images import image_size, read_image
from .packer import Sample, Segment, TextSegment, VaeSegment, VitSegment
from .records import Record, RecordError
from .tokenizer import Tokenizer
from .transforms import ResizeRule

Size = tuple[int, int]
Picture = Image.Image | Size
"""An image, or its (width, height) where pixels are not needed."""


class Prompt(Protocol):
    """A context that a model generates from."""

    def add_text(self, ids: list[int]) -> None: ...
    def add_vit_image(self, image_pm1: Tensor) -> None: ...
    def add_vae_image(self, image_pm1: Tensor) -> None: ...


P = TypeVar("P", bound=Prompt)


def filled(prompt: P, segments: Iterable[Segment]) -> P:
    """The prompt itself, with the segments added in order."""
    for segment in segments:
        if isinstance(segment, TextSegment):
            prompt.add_text(segment.ids)
        elif isinstance(segment, VitSegment):
            prompt.add_vit_image(segment.image_pm1)
        else:
            prompt.add_vae_image(segment.image_pm1)
    return prompt


@dataclass(frozen=True)
class RestorationTask:
    """Restoration as a prompt and a training sample, by one tokenizer and two resize rules."""

    tokenizer: Tokenizer
    vae_rule: ResizeRule
    vit_rule: ResizeRule

    def require_strides(self, latent_stride: int, vit_patch: int) -> None:
        """Raises ValueError where a resize rule gives sizes that the model cannot take."""
        found = self.vae_rule.image_stride, self.vit_rule.image_stride
        for name, ours, model in zip(RULES, found, (latent_stride, vit_patch), strict=True):
            if ours % model:
                raise ValueError(
                    f"{name}: image_stride={ours} is no multiple of the model's {model}"
                )

    def context(
        self, degraded: Picture, instruction: str, droppable: bool = False
    ) -> list[Segment]:
        """The degraded image as latents, again as ViT patches, then the instruction."""
        return [
            VaeSegment(image_pm1=_resized(self.vae_rule, degraded), droppable=droppable),
            VitSegment(image_pm1=_resized(self.vit_rule, degraded), droppable=droppable),
            TextSegment(ids=self.tokenizer.encode(instruction), droppable=droppable),
        ]

    def sample(self, record: Record, folder: Path) -> Sample:
        """Context, then the assessment as an answer (if the record has one), then the clean image.

        Raises RecordError when the record has no output image or states another size than an image
        has, and ImageError when an image cannot be read.
        """
        return self._sample(record, lambda path, size: _decoded(record, folder, path, size))

    def outline(self, record: Record, folder: Path) -> Sample:
        """The sample without pixels, to count its tokens: its images lie on the meta device.

        Sizes are those that the record states, else those of the files' headers. Raises RecordError
        and ImageError as `sample` does, but looks at no size that is stated.
        """
        return self._sample(record, lambda path, size: size or image_size(folder / path))

    def _sample(self, record: Record, image: Callable[[str, Size | None], Picture]) -> Sample:
        """`image` takes the path of an image and the size that the record states."""
        if record.output_image is None:
            raise RecordError(f"{record.source}: restoration needs output_img")
        degraded = image(record.input_image, record.input_size)
        clean = image(record.output_image, record.output_size)
        segments = self.context(degraded, record.instruction, droppable=True)
        if record.assessment:
            segments.append(TextSegment(ids=self.tokenizer.encode(record.assessment), answer=True))
        segments.append(VaeSegment(image_pm1=_resized(self.vae_rule, clean), target=True))
        return Sample(record.source, segments)


def _decoded(record: Record, folder: Path, path: str, stated: Size | None) -> Image.Image:
    image = read_image(folder / path)
    if stated not in (None, image.size):
        raise RecordError(
            f"{record.source}: says that width and height of {path} are {stated}, but they are "
            f"{image.size}: correct or remove them"
        )
    return image


def _resized(rule: ResizeRule, image: Picture) -> Tensor:
    if isinstance(image, Image.Image):
        return rule(image)
    width, height = rule.size(*image)
    return torch.empty(3, height, width, device="meta")
