"""Checkpoint folder -> assess(image), restore(image): the Python API of inference.

restorer = Restorer.load("configs/tiny/checkpoint")
result = restorer.restore(Image.open("scan.png"), "Remove the noise.")
result.image.save("restored.png"); print(result.assessment)
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.config import RULES
from data.images import to_uint8
from data.packer import Segment, TextSegment, VitSegment
from data.tasks import RestorationTask, filled
from data.tokenizer import Tokenizer
from data.transforms import ResizeRule
from modeling.bagel.bagel import Bagel
from modeling.bagel.generation import Context, SamplingConfig, generate_image
from modeling.pretrained import PREPROCESSOR_FILE, LoadReport, Weights, load_pretrained

DEFAULT_RULES = {
    "image_transform_args": {"image_stride": 16, "max_image_size": 2048, "min_image_size": 128},
    "vit_image_transform_args": {"image_stride": 14, "max_image_size": 518, "min_image_size": 224},
}
"""Resize rules of the users' batch script, for folders that do not say theirs."""


@dataclass(frozen=True)
class Restoration:
    image: Image.Image
    """RGB, at the size that the resize rule gives the input."""
    assessment: str


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    max_new_tokens: int = 800
    temperature: float = 0.0
    """0 decodes greedily."""


@dataclass(frozen=True)
class Restorer:
    """A loaded model with the tokenizer and the resize rules that it was trained with."""

    model: Bagel
    task: RestorationTask
    report: LoadReport

    @classmethod
    def load(cls, folder: str | Path, weights: Weights = "ema", **options: Any) -> "Restorer":
        """A checkpoint folder, loaded strictly; `options` (device, dtype) as of `load_pretrained`.

        Raises CheckpointError when the folder does not fit.
        """
        model, report = load_pretrained(folder, weights, **options)
        path = Path(folder) / PREPROCESSOR_FILE
        rules = json.loads(path.read_text()) if path.exists() else DEFAULT_RULES
        task = RestorationTask(Tokenizer(folder), *(ResizeRule(**rules[name]) for name in RULES))
        task.require_strides(model.config.latent_stride, model.config.vit_patch)
        return cls(model.eval(), task, report)

    def _context(self, segments: Iterable[Segment]) -> Context:
        return filled(Context(self.model, self.task.tokenizer.special), segments)

    def _assess(
        self, image: Image.Image, instruction: str, text: TextConfig, generator: torch.Generator
    ) -> tuple[list[Segment], Context, list[int]]:
        """The prompt, the context of prompt and assessment, and the assessment's ids."""
        if not instruction.strip():
            raise ValueError("the instruction is empty")
        prompt = self.task.context(image, instruction)
        context, num_ids = self._context(prompt), self.task.tokenizer.size
        ids = context.generate_text(text.max_new_tokens, num_ids, text.temperature, generator)
        return prompt, context, ids

    @torch.inference_mode()
    def assess(
        self, image: Image.Image, instruction: str, text: TextConfig | None = None, seed: int = 42
    ) -> str:
        """What is wrong with an image, in the words of the training data."""
        generator = torch.Generator().manual_seed(seed)
        _, _, ids = self._assess(image, instruction, text or TextConfig(), generator)
        return self.task.tokenizer.decode(ids)

    @torch.inference_mode()
    def answer(
        self,
        images: list[Image.Image],
        question: str,
        text: TextConfig | None = None,
        seed: int = 42,
    ) -> str:
        """The answer to a question about images, which only the ViT sees, in their order.

        Raises ValueError for an empty question.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        text, tokenizer = text or TextConfig(), self.task.tokenizer
        seen = [VitSegment(image_pm1=self.task.vit_rule(image)) for image in images]
        context = self._context([*seen, TextSegment(ids=tokenizer.encode(question))])
        generator = torch.Generator().manual_seed(seed)
        limits = text.max_new_tokens, tokenizer.size, text.temperature
        return tokenizer.decode(context.generate_text(*limits, generator))

    def answers(
        self,
        requests: Iterable[tuple[list[Image.Image], str]],
        text: TextConfig | None = None,
        seed: int = 42,
        batch_size: int = 8,
    ) -> Iterator[tuple[int, str]]:
        """(place of the request, its answer) as they finish."""
        for place, (images, question) in enumerate(requests):
            yield place, self.answer(images, question, text, seed)

    @torch.inference_mode()
    def restore(
        self,
        image: Image.Image,
        instruction: str,
        sampling: SamplingConfig | None = None,
        text: TextConfig | None = None,
        seed: int = 42,
    ) -> Restoration:
        """Assesses an image, then restores it with the assessment in context, as trained.

        Image and text are functions of the input and `seed` alone. Raises ValueError for an empty
        instruction.
        """
        sampling, text = sampling or SamplingConfig(), text or TextConfig()
        generator = torch.Generator().manual_seed(seed)
        prompt, context, assessment = self._assess(image, instruction, text, generator)
        branches = []
        if sampling.cfg_text_scale > 1:
            branches.append(self._context(s for s in prompt if not isinstance(s, TextSegment)))
            if sampling.cfg_img_scale > 1:
                texts = [s for s in prompt if isinstance(s, TextSegment)]
                branches.append(self._context([*texts, TextSegment(ids=assessment)]))
        size = self.task.vae_rule.size(*image.size)
        pixels = to_uint8(generate_image(context, size, sampling, generator, *branches))
        return Restoration(Image.fromarray(pixels), self.task.tokenizer.decode(assessment))

    @torch.inference_mode()
    def autoencode(self, image: Image.Image) -> Image.Image:
        """The autoencoder's reconstruction of an image: the ceiling of any restoration."""
        image_pm1: Tensor = self.task.vae_rule(image).to(self.model.device)
        latent = self.model.encode_images([image_pm1])[0]
        return Image.fromarray(to_uint8(self.model.vae.decode(latent[None])[0]))
