"""Record -> segments: the one place that says how a sample is laid out.

Training and inference call the same function, so a prompt cannot differ between them.
"""

from pathlib import Path

from PIL import Image

from .images import read_image
from .packer import Sample, Segment, TextSegment, VaeSegment, VitSegment
from .records import Record, RecordError
from .tokenizer import Tokenizer
from .transforms import ResizeRule


def restoration_context(
    degraded: Image.Image,
    instruction: str,
    tokenizer: Tokenizer,
    vae_rule: ResizeRule,
    vit_rule: ResizeRule,
    droppable: bool = False,
) -> list[Segment]:
    """The degraded image as latents, again as ViT patches, then the instruction."""
    return [
        VaeSegment(image_pm1=vae_rule(degraded), droppable=droppable),
        VitSegment(image_pm1=vit_rule(degraded), droppable=droppable),
        TextSegment(ids=tokenizer.encode(instruction), droppable=droppable),
    ]


def restoration_sample(
    record: Record,
    folder: Path,
    tokenizer: Tokenizer,
    vae_rule: ResizeRule,
    vit_rule: ResizeRule,
    droppable: bool = False,
) -> Sample:
    """Context, then the assessment as an answer (if the record has one), then the clean image.

    The first input and output image of a record count. Raises RecordError when the record has no
    output image and ImageError when an image cannot be read.
    """
    if not record.output_images:
        raise RecordError(f"{record.source}: restoration needs output_img")
    degraded = read_image(folder / record.input_images[0])
    clean = read_image(folder / record.output_images[0])
    segments = restoration_context(
        degraded, record.instruction, tokenizer, vae_rule, vit_rule, droppable
    )
    if record.assessment:
        segments.append(TextSegment(ids=tokenizer.encode(record.assessment), answer=True))
    segments.append(VaeSegment(image_pm1=vae_rule(clean), target=True))
    return Sample(record.source, segments)
