"""Checkpoint folder -> assess(image), restore(image): the Python API of inference.

restorer = Restorer.load("configs/tiny/checkpoint")
result = restorer.restore(Image.open("scan.png"), "Remove the noise.")
result.image.save("restored.png"); print(result.assessment)
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.images import to_uint8
from data.packer import Segment, TextSegment, VaeSegment, VitSegment
from data.tasks import restoration_context
from data.tokenizer import Tokenizer, load_tokenizer
from data.transforms import ResizeRule
from modeling.bagel.bagel import Bagel
from modeling.bagel.generation import Context, SamplingConfig, decode_image, sample_latents
from modeling.geometry import token_grid
from modeling.pretrained import PREPROCESSOR_FILE, LoadReport, Weights, load_pretrained

DEFAULT_VAE_RULE = ResizeRule(image_stride=16, max_image_size=2048, min_image_size=128)
DEFAULT_VIT_RULE = ResizeRule(image_stride=14, max_image_size=518, min_image_size=224)
"""Rules of the users' batch script, for folders that do not say theirs."""


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


class Restorer:
    """A loaded model with the tokenizer and the resize rules that it was trained with."""

    def __init__(
        self, model: Bagel, tokenizer: Tokenizer, vae_rule: ResizeRule, vit_rule: ResizeRule
    ) -> None:
        if vae_rule.image_stride % model.config.latent_stride:
            raise ValueError(
                f"image_stride {vae_rule.image_stride} of the resize rule is no multiple of the "
                f"model's latent stride {model.config.latent_stride}"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.vae_rule, self.vit_rule = vae_rule, vit_rule
        self.report: LoadReport | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        weights: Weights = "ema",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "Restorer":
        """Raises CheckpointError when the folder does not load strictly."""
        model, report = load_pretrained(folder, weights, device=device, dtype=dtype)
        vae_rule, vit_rule = read_rules(Path(folder))
        restorer = cls(model, load_tokenizer(folder), vae_rule, vit_rule)
        restorer.report = report
        return restorer

    def _context(self, segments: Iterable[Segment]) -> Context:
        context = Context(self.model, self.tokenizer.special)
        for segment in segments:
            if isinstance(segment, TextSegment):
                context.add_text(segment.ids)
            elif isinstance(segment, VitSegment):
                context.add_vit_image(segment.image_pm1)
            elif isinstance(segment, VaeSegment):
                context.add_vae_image(segment.image_pm1)
        return context

    def _prompt(self, image: Image.Image, instruction: str) -> list[Segment]:
        if not instruction.strip():
            raise ValueError("the instruction is empty")
        return restoration_context(image, instruction, self.tokenizer, self.vae_rule, self.vit_rule)

    def _assess(self, context: Context, text: TextConfig, generator: torch.Generator) -> list[int]:
        return context.generate_text(
            text.max_new_tokens, self.tokenizer.size, text.temperature, generator
        )

    @torch.inference_mode()
    def assess(
        self, image: Image.Image, instruction: str, text: TextConfig | None = None, seed: int = 42
    ) -> str:
        """What is wrong with an image, in the words of the training data."""
        context = self._context(self._prompt(image, instruction))
        generator = torch.Generator().manual_seed(seed)
        return self.tokenizer.decode(self._assess(context, text or TextConfig(), generator))

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
        prompt = self._prompt(image, instruction)
        context = self._context(prompt)
        assessment = self._assess(context, text, generator)
        width, height = self.vae_rule.size(image.width, image.height)
        grid = token_grid((height, width), self.model.config.latent_stride)
        noise = torch.randn(
            grid[0] * grid[1], self.model.config.patch_latent_dim, generator=generator
        ).to(self.model.device)
        branches = self._guidance(prompt, assessment, sampling)
        tokens = sample_latents(context, noise, grid, sampling, *branches)
        pixels = to_uint8(decode_image(self.model, tokens, grid))
        return Restoration(Image.fromarray(pixels), self.tokenizer.decode(assessment))

    def _guidance(
        self, prompt: list[Segment], assessment: list[int], sampling: SamplingConfig
    ) -> tuple[Context | None, Context | None]:
        """Contexts without any text and without images, where the scales ask for them."""
        if sampling.cfg_text_scale <= 1:
            return None, None
        without_text = self._context(s for s in prompt if not isinstance(s, TextSegment))
        if sampling.cfg_img_scale <= 1:
            return without_text, None
        texts = [s for s in prompt if isinstance(s, TextSegment)]
        return without_text, self._context([*texts, TextSegment(ids=assessment)])

    @torch.inference_mode()
    def autoencode(self, image: Image.Image) -> Image.Image:
        """The autoencoder's reconstruction of an image: the ceiling of any restoration."""
        image_pm1: Tensor = self.vae_rule(image).to(self.model.device)
        latent = self.model.encode_images([image_pm1])[0]
        return Image.fromarray(to_uint8(self.model.vae.decode(latent[None])[0]))


def read_rules(folder: Path) -> tuple[ResizeRule, ResizeRule]:
    """The VAE's and the ViT's resize rule of a folder, or those of the users' batch script."""
    path = folder / PREPROCESSOR_FILE
    if not path.exists():
        return DEFAULT_VAE_RULE, DEFAULT_VIT_RULE
    rules = json.loads(path.read_text())
    return (
        ResizeRule(**rules["image_transform_args"]),
        ResizeRule(**rules["vit_image_transform_args"]),
    )
