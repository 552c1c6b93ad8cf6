"""Segments -> PackedBatch: samples end to end in one sequence. No I/O; randomness only from the
generator that comes with each sample, so a sample looks the same in whatever pack it lands."""

from dataclasses import dataclass, fields
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from modeling.batch import (
    AnswerLabels,
    AttentionMode,
    PackedBatch,
    SpecialTokens,
    TextTokens,
    VaeImages,
    VitImages,
)
from modeling.flow import CONDITIONING, logit_from_time
from modeling.geometry import patchify, position_ids, token_grid

Images = TypeVar("Images", VitImages, VaeImages)


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """A part of a sample. `droppable` conditions are left out by their dropout probability."""

    droppable: bool = False
    with_text: bool = False
    """Left out with the droppable text before it, by one draw for both."""
    end_label: int | None = None
    """Token that the segment's last token is trained to announce, if any."""


@dataclass(frozen=True, kw_only=True)
class TextSegment(_Segment):
    ids: list[int]
    """Without bos and eos."""
    answer: bool = False
    """Trained with cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class VitSegment(_Segment):
    image_pm1: Tensor
    """(3, H, W) in [-1, 1], sides multiples of the ViT patch."""


@dataclass(frozen=True, kw_only=True)
class VaeSegment(_Segment):
    image_pm1: Tensor
    """(3, H, W) in [-1, 1], sides multiples of the latent stride."""
    target: bool = False
    """Generated (with noise) rather than a condition."""


Segment = TextSegment | VitSegment | VaeSegment


@dataclass(frozen=True)
class Sample:
    name: str
    """Where it came from, for messages."""
    segments: list[Segment]


@dataclass(frozen=True, kw_only=True)
class PackerConfig:
    """What packing must know of the model, and how conditions and times are drawn."""

    latent_stride: int
    """Pixels per latent token along each side."""
    max_latent_size: int
    vit_patch_size: int
    vit_max_num_patch_per_side: int
    interpolate_pos: bool = False
    text_cond_dropout_prob: float = 0.1
    vae_cond_dropout_prob: float = 0.3
    vit_cond_dropout_prob: float = 0.3
    full_noise_fraction: float = 0.0
    """Share of the target images at t = 1, where few-step sampling starts."""
    low_t_fraction: float = 0.0
    """Share with t uniform in (0, low_t_max]; the rest are at t = sigmoid(N(0, 1)), shifted."""
    low_t_max: float = 1.0
    timestep_shift: float = 1.0
    ce_loss_reweighting: bool = False
    """Weighs each label by 1 / sqrt(labels of its sample): long answers count less per token."""

    def __post_init__(self) -> None:
        if not 0 <= self.full_noise_fraction + self.low_t_fraction <= 1:
            raise ValueError(
                f"full_noise_fraction={self.full_noise_fraction} and "
                f"pixel_space_t_fraction={self.low_t_fraction} exceed 1 together"
            )

    def grid(self, segment: VitSegment | VaeSegment) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        stride = self.vit_patch_size if isinstance(segment, VitSegment) else self.latent_stride
        return token_grid(segment.image_pm1.shape, stride)

    def num_tokens(self, sample: Sample) -> int:
        """Tokens of a sample without any dropout."""
        return sum(
            2 + (len(s.ids) if isinstance(s, TextSegment) else prod(self.grid(s)))
            for s in sample.segments
        )


def _joined(parts: list[Images]) -> Images | None:
    """One record of many, tensors and tuples end to end; None without any."""
    if not parts:
        return None
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(parts[0])):
        values = [getattr(part, name) for part in parts]
        joined[name] = torch.cat(values) if isinstance(values[0], Tensor) else sum(values, ())
    return type(parts[0])(**joined)


class Packer:
    """Collects samples with `add` and makes one batch of them with `build`."""

    def __init__(self, config: PackerConfig, tokens: SpecialTokens) -> None:
        self.config, self.tokens = config, tokens
        self.sample_lens: list[int] = []
        self.split_lens: list[int] = []
        self.attn_modes: list[AttentionMode] = []
        self.positions: list[int] = []
        self.text: dict[int, int] = {}
        """Place in the sequence -> token id."""
        self.labels: dict[int, int] = {}
        """Place in the sequence -> token id to predict there."""
        self.label_weights: list[float] = []
        self.vit: list[VitImages] = []
        self.vae: list[VaeImages] = []

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    def add(self, sample: Sample, generator: torch.Generator) -> None:
        before, position, text_dropped = self.num_tokens, 0, False
        for segment in sample.segments:
            is_text = isinstance(segment, TextSegment)
            dropped = segment.droppable and self._dropped(segment, generator)
            if is_text and segment.droppable:
                text_dropped = dropped
            if dropped or (segment.with_text and text_dropped):
                position += not is_text
                continue
            if isinstance(segment, TextSegment):
                mode, offsets = self._add_text(segment)
            else:
                mode, offsets = self._add_image(segment, sample.name, generator)
            self.positions += [position + offset for offset in offsets]
            self.split_lens.append(len(offsets))
            self.attn_modes.append(mode)
            if segment.end_label is not None:
                self.labels[self.num_tokens - 1] = segment.end_label
            if mode != "noise":
                position += offsets[-1] + 1
        labels = len(self.labels) - len(self.label_weights)
        weight = labels**-0.5 if labels and self.config.ce_loss_reweighting else 1.0
        self.label_weights += [weight] * labels
        if self.num_tokens > before:
            self.sample_lens.append(self.num_tokens - before)

    def _dropped(self, segment: Segment, generator: torch.Generator) -> bool:
        probability = {
            TextSegment: self.config.text_cond_dropout_prob,
            VitSegment: self.config.vit_cond_dropout_prob,
            VaeSegment: self.config.vae_cond_dropout_prob,
        }[type(segment)]
        return torch.rand((), generator=generator).item() < probability

    def _add_text(self, segment: TextSegment) -> tuple[AttentionMode, list[int]]:
        """Attention mode of the segment and positions of its tokens, from 0."""
        ids = [self.tokens.bos, *segment.ids, self.tokens.eos]
        self.text |= enumerate(ids, self.num_tokens)
        if segment.answer:
            self.labels |= enumerate(ids[1:], self.num_tokens)
        return "causal", list(range(len(ids)))

    def _add_image(
        self, segment: VitSegment | VaeSegment, name: str, generator: torch.Generator
    ) -> tuple[AttentionMode, list[int]]:
        config, grid, start = self.config, self.config.grid(segment), self.num_tokens
        n, vit = prod(grid), isinstance(segment, VitSegment)
        target = isinstance(segment, VaeSegment) and segment.target
        side = config.vit_max_num_patch_per_side if vit else config.max_latent_size
        places = {
            "position_ids": position_ids(*grid, side, config.interpolate_pos),
            "indexes": torch.arange(start + 1, start + 1 + n),
        }
        self.text |= {start: self.tokens.image_start, start + 1 + n: self.tokens.image_end}
        if vit:
            patches = patchify(segment.image_pm1, config.vit_patch_size)
            self.vit.append(VitImages(patches=patches, lens=(n,), **places))
        else:
            self.vae.append(
                VaeImages(
                    images=(segment.image_pm1,),
                    grids=(grid,),
                    time_logits=(self._time_logit(generator) if target else CONDITIONING,),
                    noise_seeds=(int(torch.randint(2**62, (), generator=generator)),),
                    names=(name,),
                    splits=(len(self.split_lens),),
                    **places,
                )
            )
        return "noise" if target else "full", [0] * (n + 2)

    def _time_logit(self, generator: torch.Generator) -> float:
        config = self.config
        kind = torch.rand((), generator=generator).item()
        uniform = 1 - torch.rand((), generator=generator).item()
        logit = torch.randn((), generator=generator).item()
        if kind < config.full_noise_fraction:
            return float("inf")
        if kind < config.full_noise_fraction + config.low_t_fraction:
            return logit_from_time(uniform * config.low_t_max, config.timestep_shift)
        return logit

    def build(self) -> PackedBatch:
        """Raises ValueError when no token was packed."""
        if not self.positions:
            raise ValueError("an empty pack: every segment of every sample was dropped")
        text, weights, labels = self.text, self.label_weights, None
        if weights:
            labels = AnswerLabels(
                ids=torch.tensor([*self.labels.values()]),
                indexes=torch.tensor([*self.labels]),
                weights=torch.tensor(weights),
                total_weight=sum(weights),
            )
        return PackedBatch(
            sample_lens=tuple(self.sample_lens),
            split_lens=tuple(self.split_lens),
            attn_modes=tuple(self.attn_modes),
            position_ids=torch.tensor(self.positions),
            text=TextTokens(ids=torch.tensor([*text.values()]), indexes=torch.tensor([*text])),
            labels=labels,
            vit=_joined(self.vit),
            vae=_joined(self.vae),
        )
