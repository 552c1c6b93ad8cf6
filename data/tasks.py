"""Record -> segments: the one place that says how a sample is laid out.

Training and inference use the same object, so a prompt cannot differ between them. Conditions are
droppable where inference uses guidance: before an image that is drawn, not before an answer alone.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .files import UNREADABLE, NamedBytes, Place, read_bytes, within
from .images import ImageError, image_size, read_image, require_one_window
from .packer import Sample, Segment, TextSegment, VaeSegment, VitSegment
from .records import IMAGE_TAG, Form, ImageRef, Record, RecordError, Size
from .tokenizer import Tokenizer
from .transforms import NO_IMAGES, RULES, ResizeRule
from .volumes import UnreachableError

Picture = Image.Image | Size
"""An image, or its (width, height) where pixels are not needed."""
Look = Callable[[ImageRef], Picture]
VAE_RULE, VIT_RULE = RULES
PAIRS = Form(needs=("inputs", "outputs", "texts"), paired=True)
LARGEST_FACTOR = 4
"""A target may be this many times as wide and high as its input."""


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
class Task(ABC):
    """How samples are laid out, by one tokenizer and two resize rules. A task says `segments`."""

    tokenizer: Tokenizer
    vae_rule: ResizeRule = NO_IMAGES
    vit_rule: ResizeRule = NO_IMAGES
    form: ClassVar[Form] = Form()
    rules: ClassVar[tuple[str, ...]] = RULES
    """Of the images that the task has."""
    chooses: ClassVar[bool] = False
    """Whether the segments of a record depend on a choice."""

    def require_strides(self, latent_stride: int, vit_patch: int) -> None:
        """Raises ValueError where a resize rule gives sizes that the model cannot take."""
        found = self.vae_rule.image_stride, self.vit_rule.image_stride
        for name, ours, model in zip(RULES, found, (latent_stride, vit_patch), strict=True):
            if name in self.rules and ours % model:
                raise ValueError(
                    f"{name}: image_stride={ours} is no multiple of the model's {model}"
                )

    def sample(self, record: Record, folder: Place, seed: int = 0) -> Sample:
        """The segments with their pixels; `seed` is that of what the task chooses.

        Raises RecordError when the record does not suit the task or states another size than an
        image has, and ImageError when an image cannot be read or those of a pair differ in window.
        """
        seen, paired = dict[ImageRef, Image.Image](), self.form.paired
        images = lambda ref: seen.setdefault(ref, decoded(record, folder, ref, paired))  # noqa: E731
        segments = self.segments(record, images, Random(seed))
        require_one_window(record.source, seen.values())
        return Sample(record.source, segments)

    def outline(self, record: Record, folder: Place, seed: int = 0) -> Sample:
        """The sample without pixels, to count its tokens: its images lie on the meta device.

        Sizes are those that the record states, else those of the files' headers. Raises RecordError
        and ImageError as `sample` does, but looks at no size that is stated.
        """
        images = lambda ref: ref.size or image_size(_file(folder, ref))  # noqa: E731
        return Sample(record.source, self.segments(record, images, Random(seed)))

    @abstractmethod
    def segments(self, record: Record, look: Look, choice: Random) -> list[Segment]:
        """Raises RecordError when the record does not suit the task."""

    def text(self, words: str, droppable: bool = False, answer: bool = False) -> TextSegment:
        return TextSegment(ids=self.tokenizer.encode(words), droppable=droppable, answer=answer)

    def vit(self, image: Picture, droppable: bool = False) -> VitSegment:
        return VitSegment(image_pm1=_resized(self.vit_rule, image), droppable=droppable)

    def _seen(self, image: Picture, droppable: bool) -> list[Segment]:
        """An image as latents, again as ViT patches."""
        latents = VaeSegment(image_pm1=_resized(self.vae_rule, image), droppable=droppable)
        return [latents, self.vit(image, droppable)]

    def _target(self, image: Picture) -> VaeSegment:
        return VaeSegment(image_pm1=_resized(self.vae_rule, image), target=True)

    def _require_sizes(self, record: Record, given: Picture, target: Picture) -> None:
        require_sizes(record.source, self.vae_rule, _size(given), _size(target))


class RestorationTask(Task):
    """An image is assessed, then restored. Of several images and messages, the first input, the
    first output and the last messages count."""

    form = PAIRS

    def context(
        self, degraded: Picture, instruction: str, droppable: bool = False
    ) -> list[Segment]:
        """The degraded image as latents, again as ViT patches, then the instruction."""
        return [*self._seen(degraded, droppable), self.text(instruction, droppable)]

    def segments(self, record: Record, look: Look, choice: Random) -> list[Segment]:
        """Context, then the assessment as an answer (if the record has one), the clean image. The
        assessment is dropped with the instruction."""
        degraded, clean = look(record.inputs[0]), look(record.outputs[0])
        self._require_sizes(record, degraded, clean)
        segments = self.context(degraded, record.instruction, droppable=True)
        if record.assessment:
            # Guidance takes its image without texts from the input alone.
            answer = self.text(record.assessment, answer=True)
            segments.append(replace(answer, with_text=True))
        return [*segments, self._target(clean)]


class CounterfactualTask(Task):
    """What an image would look like if, and why: the explanation follows the image."""

    form = PAIRS

    def segments(self, record: Record, look: Look, choice: Random) -> list[Segment]:
        given, target = look(record.inputs[0]), look(record.outputs[0])
        self._require_sizes(record, given, target)
        said = (t.replace(IMAGE_TAG, "").strip() for who, t in record.messages if who != "gpt")
        asked = [self.text(text, droppable=True) for text in said if text]
        segments = [*self._seen(given, droppable=True), *asked, self._target(target)]
        if record.assessment:
            segments.append(self.text(record.assessment, answer=True))
        return segments


class TextToImageTask(Task):
    """A caption, then its image. Captions are the human message, or the field `captions` or
    `caption`: a text, a list, or a mapping (also written as JSON), of which one is chosen."""

    form = Form(inputs=(), outputs=("output_img", "image", "images"), needs=("outputs",))
    rules = (VAE_RULE,)
    chooses = True

    def segments(self, record: Record, look: Look, choice: Random) -> list[Segment]:
        caption = choice.choice(self._captions(record))
        return [self.text(caption, droppable=True), self._target(look(record.outputs[0]))]

    def _captions(self, record: Record) -> list[str]:
        named = record.raw.get("captions"), record.raw.get("caption"), record.instruction
        found: Any = next(value for value in named if value is not None)
        if isinstance(found, str) and found.lstrip()[:1] in ("{", "["):
            # Else it is a text that begins so: `[CT] axial slice`.
            with suppress(ValueError, RecursionError):
                found = json.loads(found)
        values = list(found.values()) if isinstance(found, dict) else found
        captions = [v for v in values if v] if isinstance(values, list) else [values]
        if not any(captions) or not all(isinstance(caption, str) for caption in captions):
            raise RecordError(f"{record.source}: text to image needs captions or a human message")
        try:
            "".join(captions).encode()
        except UnicodeEncodeError as error:
            text = "a lone surrogate in JSON captions is no text"
            raise RecordError(f"{record.source}: {text}") from error
        return captions


class VlmTask(Task):
    """A conversation about any number of images, which stand where `<image>` does (before all
    texts if that is nowhere); what gpt says is trained."""

    form = Form(needs=("texts",))
    rules: ClassVar[tuple[str, ...]] = (VIT_RULE,)

    def segments(self, record: Record, look: Look, choice: Random) -> list[Segment]:
        return self._conversation(record, [look(ref) for ref in record.inputs])

    def _conversation(self, record: Record, images: list[Picture]) -> list[Segment]:
        tags = require_tags(record)
        left = iter(images)
        segments: list[Segment] = [] if tags else [self.vit(image) for image in left]
        for who, text in record.messages:
            for place, part in enumerate(text.split(IMAGE_TAG)):
                if place:
                    segments.append(self.vit(next(left)))
                if part.strip():
                    segments.append(self.text(part.strip(), answer=who == "gpt"))
        if not any(isinstance(s, TextSegment) and s.answer for s in segments):
            raise RecordError(f"{record.source}: the conversation holds no answer from `gpt`")
        return segments


class TextTask(VlmTask):
    """A conversation without images."""

    form = Form(inputs=(), needs=("texts",))
    rules = ()


class VqaReconstructionTask(VlmTask):
    """A conversation about images, then the images again, to be drawn."""

    form = Form()
    rules = RULES

    def segments(self, record: Record, look: Look, choice: Random) -> list[Segment]:
        images = [look(ref) for ref in record.inputs]
        return [*self._conversation(record, images), *map(self._target, images)]


class EditSequenceTask(Task):
    """Two images of a sequence: the earlier, the instructions that lead on, the later.

    `image_list` holds the images; entry i of `instruction_list` the ways to say how image i
    becomes image i + 1, of which one is chosen.
    """

    form = Form(inputs=("image_list",), needs=("inputs",), paired=True)
    chooses = True
    longest: ClassVar[int] = 2
    """Steps between the two images."""

    def segments(self, record: Record, look: Look, choice: Random) -> list[Segment]:
        steps: Any = record.raw.get("instruction_list")
        ways = [_texts(step) for step in steps] if isinstance(steps, list) else []
        images = len(record.inputs)
        if images < 2 or len(ways) != images - 1 or not all(ways):
            raise RecordError(
                f"{record.source}: {images} images in image_list need one entry less, of texts, in "
                "instruction_list, and there must be two"
            )
        first = choice.randrange(images - 1)
        last = choice.randint(first + 1, min(first + self.longest, images - 1))
        given, target = look(record.inputs[first]), look(record.inputs[last])
        self._require_sizes(record, given, target)
        told = [self.text(choice.choice(way), droppable=True) for way in ways[first:last]]
        return [*self._seen(given, droppable=True), *told, self._target(target)]


NAMES: dict[type[Task], str] = {
    RestorationTask: "restoration editing MedicalImageEditingIterableDataset_ver1",
    CounterfactualTask: "counterfactual CounterfactualMedicalIterableDataset_ver1",
    TextToImageTask: "text_to_image t2i_pretrain T2IIterableDataset T2IIterableDataset_Ver1",
    VlmTask: "vlm_sft SftJSONLIterableDataset SftJSONLIterableDataset_Ver1",
    VqaReconstructionTask: (
        "vqa_reconstruction SftJSONLIterableDataset_with_VisualReconstruction_Ver1 "
        "SftJSONLIterableDataset_with_VisualReconstruction_Ver2"
    ),
    TextTask: "text_only SftJSONLIterableDataset_TextOnly",
    EditSequenceTask: "edit_sequence unified_edit UnifiedEditIterableDataset",
}
TASKS = {name: task for task, names in NAMES.items() for name in names.split()}
"""By name in a mixture: ours first, then those of the users' classes."""


def require_sizes(source: str, rule: ResizeRule, given: Size, target: Size) -> None:
    """Raises RecordError unless, after the rule, the target has the input's shape and is as large
    or up to LARGEST_FACTOR times larger. Sizes are (width, height); `source` begins the message."""
    old, new = rule.size(*given), rule.size(*target)
    factor = max(new) / max(old)
    slack = rule.image_stride * max(factor, 1)
    shaped = all(abs(n - factor * o) <= slack for n, o in zip(new, old, strict=True))
    # Both sides were rounded to the stride.
    least, most = 1 - rule.image_stride / max(old), LARGEST_FACTOR
    if not shaped or not least <= factor <= most:
        raise RecordError(
            f"{source}: input and target are {old} and {new} after {VAE_RULE}; the "
            f"target must have the input's shape, at 1 to {most} times its size"
        )


def require_tags(record: Record) -> int:
    """How many image tags the texts have. Raises RecordError unless as many as images, or none."""
    tags, images = sum(t.count(IMAGE_TAG) for _, t in record.messages), len(record.inputs)
    if tags not in (0, images):
        raise RecordError(f"{record.source}: {tags} {IMAGE_TAG} for {images} images")
    return tags


def _texts(step: Any) -> list[str]:
    texts = [step] if isinstance(step, str) else step
    good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return texts if good else []


def _file(folder: Place, ref: ImageRef) -> Path | NamedBytes:
    """Of an image; one at a URL is fetched."""
    if ref.content is not None:
        return NamedBytes(ref.content, ref.path)
    where = within(folder, ref.path)
    if isinstance(where, Path):
        return where
    try:
        return NamedBytes(read_bytes(where), where)
    except UNREADABLE as error:
        lost = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (UnreachableError if lost else ImageError)(f"{where}: {error}") from error


def open_image(folder: Place, ref: ImageRef, paired: bool = False) -> Image.Image:
    """Raises ImageError as `read_image` does."""
    return read_image(_file(folder, ref), paired)


def open_pair(record: Record, folder: Place) -> tuple[Image.Image, Image.Image]:
    """First input and first output, scaled alike. Raises ImageError."""
    given, target = (open_image(folder, ref, True) for ref in (record.inputs[0], record.outputs[0]))
    require_one_window(record.source, (given, target))
    return given, target


def decoded(record: Record, folder: Place, ref: ImageRef, paired: bool = False) -> Image.Image:
    """Raises ImageError, and RecordError when the record states another size than the image has."""
    image = open_image(folder, ref, paired)
    if ref.size not in (None, image.size):
        raise RecordError(
            f"{record.source}: says that width and height of {ref.path} are {ref.size}, but they "
            f"are {image.size}: correct or remove them"
        )
    return image


def _size(image: Picture) -> Size:
    return image.size if isinstance(image, Image.Image) else image


def _resized(rule: ResizeRule, image: Picture) -> Tensor:
    if isinstance(image, Image.Image):
        return rule(image)
    width, height = rule.size(*image)
    return torch.empty(3, height, width, device="meta")
