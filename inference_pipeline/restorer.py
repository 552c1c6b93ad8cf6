"""Checkpoint folder -> assess, restore, edit, answer: the Python API of inference.

restorer = Restorer.load("configs/tiny/checkpoint")
result = restorer.restore(Image.open("scan.png"), "Remove the noise.")
result.image.save("restored.png"); print(result.assessment)
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from data.images import to_image
from data.packer import Segment, TextSegment
from data.records import Size
from data.tasks import RestorationTask, filled
from data.tokenizer import Tokenizer
from data.transforms import RULES, ResizeRule
from modeling.bagel.bagel import Bagel
from modeling.bagel.context import Context
from modeling.bagel.generation import (
    ImageJob,
    SamplingConfig,
    TextConfig,
    TextJob,
    generate_images,
    generate_texts,
)
from modeling.pretrained import PREPROCESSOR_FILE, LoadReport, Weights, load_pretrained

from .devices import spread

Rules = Mapping[str, Mapping[str, int]]
DEFAULT_RULES: Rules = {
    "image_transform_args": {"image_stride": 16, "max_image_size": 2048, "min_image_size": 128},
    "vit_image_transform_args": {"image_stride": 14, "max_image_size": 518, "min_image_size": 224},
}
"""Resize rules of the users' second batch script, for folders that say none or one of them."""
FIRST_RULES: Rules = {
    **DEFAULT_RULES,
    "image_transform_args": {"image_stride": 16, "max_image_size": 1024, "min_image_size": 512},
}
"""Of their first one."""
THINK = (
    "Before you answer, reason about what is asked and what the image shows, step by step, "
    "between <think> and </think>. Then give the result."
)
"""System prompt of think mode."""
PromptStyle = Literal["trained", "origin"]
"""`trained`: the assessment follows the prompt as a text of its own, as in training. `origin`: it
comes from the ViT's view alone and is joined to the instruction, as the users' script did."""
T = TypeVar("T")


@dataclass(frozen=True)
class Restoration:
    image: Image.Image
    """RGB, at the size that the resize rule gives the input or what was asked for."""
    assessment: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the model is to read, and what it is to write or draw then."""

    prompt: list[Segment]
    text: TextConfig | None = None
    """None decodes no text."""
    sampling: SamplingConfig | None = None
    """None samples no image."""
    size: Size = (0, 0)
    """(width, height) of the image."""
    seed: int = 42


@dataclass(frozen=True)
class Reply:
    text: str
    image: Image.Image | None


@dataclass
class _Open:
    """A request whose text is being decoded or whose image waits to be sampled."""

    request: Request
    context: Context
    without_instruction: Context | None
    generator: torch.Generator
    ids: list[int]


@dataclass(frozen=True)
class Restorer:
    """A loaded model with the tokenizer and the resize rules that it was trained with.

    Every result is a function of its own input, settings and seed; what else is computed in the
    same batch changes nothing but the rounding of matrix products.
    """

    model: Bagel
    task: RestorationTask
    report: LoadReport

    @classmethod
    def load(
        cls,
        folder: str | Path,
        weights: Weights = "ema",
        max_memory: dict[int | str, str] | None = None,
        rules: Rules | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> "Restorer":
        """A checkpoint folder, loaded strictly; `options` (dtype) as of `load_pretrained`.

        `max_memory` ({0: "40GiB", 1: "40GiB", "cpu": "100GiB"}) spreads a model that does not fit
        one device, see `devices.spread`. `rules` are the resize rules for a folder that does not
        say its own. Raises CheckpointError when the folder does not fit.
        """
        first = "cpu" if max_memory else device
        model, report = load_pretrained(folder, weights, device=first, **options)
        if max_memory:
            model = spread(model, max_memory, device)
        path = Path(folder) / PREPROCESSOR_FILE
        own = json.loads(path.read_text()) if path.exists() else {}
        rules = {**(rules or DEFAULT_RULES), **own}
        task = RestorationTask(Tokenizer(folder), *(ResizeRule(**rules[name]) for name in RULES))
        task.require_strides(model.config.latent_stride, model.config.vit_patch)
        return cls(model.eval(), task, report)

    # What is asked.

    def restore(
        self,
        image: Image.Image,
        instruction: str,
        sampling: SamplingConfig | None = None,
        text: TextConfig | None = None,
        seed: int = 42,
        size: Size | None = None,
    ) -> Restoration:
        """Assesses an image, then restores it with the assessment in context, as trained.

        `size` (width, height) is that of the image to draw before the resize rule, for a larger
        one than the input. Raises ValueError for an empty instruction, and as `generate` does.
        """
        sizes = [size] if size else None
        return _only(self.restorations([(image, instruction)], sampling, text, seed, sizes=sizes))

    def restorations(
        self,
        pairs: Iterable[tuple[Image.Image, str]],
        sampling: SamplingConfig | None = None,
        text: TextConfig | None = None,
        seed: int = 42,
        batch_size: int = 1,
        prompt_style: PromptStyle = "trained",
        sizes: Sequence[Size] | None = None,
    ) -> Iterator[tuple[int, Restoration]]:
        """(index, result) of images with their instructions, as they finish.

        `sizes` (width, height) are those of the images to draw, before the resize rule; the inputs'
        own without them. Raises as `restore` does.
        """
        sampling, text = sampling or SamplingConfig(), text or TextConfig()
        kept, assessed = list(pairs), dict[int, str]()
        if prompt_style == "origin":
            questions = (([image], words) for image, words in kept)
            assessed = dict(self.answers(questions, text, seed, batch_size))

        def request(i: int) -> Request:
            image, words = kept[i]
            size = self.task.vae_rule.size(*(sizes[i] if sizes else image.size))
            words = f"{words}\n\n{assessed[i]}".rstrip() if assessed else words
            prompt, decoded = self.task.context(image, _stated(words)), None if assessed else text
            return Request(prompt=prompt, text=decoded, sampling=sampling, size=size, seed=seed)

        for i, reply in self.generate(map(request, range(len(kept))), batch_size):
            yield i, Restoration(_drawn(reply), assessed.get(i, reply.text))

    def assess(
        self, image: Image.Image, instruction: str, text: TextConfig | None = None, seed: int = 42
    ) -> str:
        """What is wrong with an image, in the words of the training data. Raises ValueError for an
        empty instruction."""
        prompt = self.task.context(image, _stated(instruction))
        request = Request(prompt=prompt, text=text or TextConfig(), seed=seed)
        return _only(self.generate([request])).text

    def edit(
        self,
        image: Image.Image,
        instruction: str,
        sampling: SamplingConfig | None = None,
        seed: int = 42,
        think: TextConfig | None = None,
    ) -> Restoration:
        """The image changed as told, without assessment; with `think` after reasoning in text.
        Raises as `restore` does."""
        prompt = self.task.context(image, _stated(instruction))
        if think:
            prompt = [self.task.text(THINK), *prompt]
        request = Request(
            prompt=prompt,
            text=think,
            sampling=sampling or SamplingConfig(),
            size=self.task.vae_rule.size(*image.size),
            seed=seed,
        )
        reply = _only(self.generate([request]))
        return Restoration(_drawn(reply), reply.text)

    def answer(
        self,
        images: Sequence[Image.Image],
        question: str,
        text: TextConfig | None = None,
        seed: int = 42,
        think: bool = False,
    ) -> str:
        """A text about any number of images, which the ViT alone reads. Raises as `answers`."""
        return _only(self.answers([(images, question)], text, seed, think=think))

    def answers(
        self,
        questions: Iterable[tuple[Sequence[Image.Image], str]],
        text: TextConfig | None = None,
        seed: int = 42,
        batch_size: int = 1,
        think: bool = False,
    ) -> Iterator[tuple[int, str]]:
        """(index, text) as they finish; a finished one makes room for the next at once. Raises
        ValueError for an empty question."""

        def request(images: Sequence[Image.Image], question: str) -> Request:
            prompt: list[Segment] = [self.task.text(THINK)] if think else []
            prompt += [self.task.vit(image) for image in images]
            prompt.append(self.task.text(_stated(question, "question")))
            return Request(prompt=prompt, text=text or TextConfig(), seed=seed)

        for i, reply in self.generate((request(*q) for q in questions), batch_size):
            yield i, reply.text

    @torch.inference_mode()
    def autoencode(self, image: Image.Image) -> Image.Image:
        """The autoencoder's reconstruction of an image: the ceiling of any restoration."""
        image_pm1: Tensor = self.task.vae_rule(image).to(self.model.device)
        latent = self.model.encode_images([image_pm1])[0]
        return to_image(self.model.vae.decode(latent[None])[0])

    # How it is computed.

    @torch.inference_mode()
    def generate(
        self, requests: Iterable[Request], batch_size: int = 1
    ) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of any mixture of requests, as they finish.

        Up to `batch_size` texts are decoded and as many images sampled at a time. Raises
        ValueError for an image that is not finite.
        """
        opened: dict[int, _Open] = {}
        ready: dict[int, _Open] = {}

        def jobs() -> Iterator[TextJob]:
            for i, request in enumerate(requests):
                opened[i] = entry = self._open(request)
                config = request.text or TextConfig(max_new_tokens=0, stop_at_eos=False)
                yield TextJob(entry.context, config, entry.generator)

        for i, ids in generate_texts(jobs(), self.task.tokenizer.size, batch_size):
            entry = opened.pop(i)
            entry.ids = ids
            if entry.request.sampling is None:
                yield i, self._reply(entry)
                continue
            ready[i] = entry
            if len(ready) == batch_size:
                yield from self._sampled(ready)
                ready = {}
        yield from self._sampled(ready)

    def _open(self, request: Request) -> _Open:
        """The context of a prompt; what guidance shares with it is computed once."""
        *before, last = request.prompt
        context = filled(self._context(), before)
        guided = request.sampling is not None and request.sampling.cfg_text_scale > 1
        without_instruction = context.fork() if guided else None
        generator = torch.Generator().manual_seed(request.seed)
        return _Open(request, filled(context, [last]), without_instruction, generator, [])

    def _context(self) -> Context:
        return Context(self.model, self.task.tokenizer.special)

    def _sampled(self, entries: dict[int, _Open]) -> Iterator[tuple[int, Reply]]:
        images = generate_images([self._image_job(entry) for entry in entries.values()])
        for (i, entry), image in zip(entries.items(), images, strict=True):
            if not image.isfinite().all():
                raise ValueError("the restored image is not finite: look at weights and guidance")
            yield i, self._reply(entry, to_image(image))

    def _image_job(self, entry: _Open) -> ImageJob:
        request, sampling = entry.request, entry.request.sampling or SamplingConfig()
        branches = [entry.without_instruction] if entry.without_instruction else []
        if branches and sampling.cfg_img_scale > 1:
            texts: list[Segment] = [s for s in request.prompt if isinstance(s, TextSegment)]
            if request.text:
                texts.append(TextSegment(ids=entry.ids))
            branches.append(filled(self._context(), texts))
        generator = entry.generator
        return ImageJob.of_size(entry.context, request.size, sampling, generator, *branches)

    def _reply(self, entry: _Open, image: Image.Image | None = None) -> Reply:
        return Reply(self.task.tokenizer.decode(entry.ids), image)


def _stated(words: str, what: str = "instruction") -> str:
    if not words.strip():
        raise ValueError(f"the {what} is empty")
    return words


def _drawn(reply: Reply) -> Image.Image:
    if reply.image is None:
        raise ValueError("this reply holds no image")
    return reply.image


def _only(results: Iterable[tuple[int, T]]) -> T:
    ((_, result),) = results
    return result
