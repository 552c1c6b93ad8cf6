"""Segments -> PackedBatch: samples end to end in one sequence. No I/O; randomness only from the
generator that comes with each sample, so a sample looks the same in whatever pack it lands."""

import dataclasses
from dataclasses import dataclass
from itertools import chain
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
from modeling.geometry import patchify, position_ids

Part = TypeVar("Part", TextTokens, AnswerLabels, VitImages, VaeImages)


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """A part of a sample. `droppable` conditions are left out by their dropout probability."""

    droppable: bool = False
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

    def __post_init__(self) -> None:
        if not 0 <= self.full_noise_fraction + self.low_t_fraction <= 1:
            raise ValueError(
                f"full_noise_fraction={self.full_noise_fraction} and "
                f"pixel_space_t_fraction={self.low_t_fraction} exceed 1 together"
            )

    def grid(self, segment: VitSegment | VaeSegment) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        stride = self.vit_patch_size if isinstance(segment, VitSegment) else self.latent_stride
        height, width = segment.image_pm1.shape[-2:]
        if height % stride or width % stride:
            raise ValueError(f"image {height}x{width} is no multiple of the stride {stride}")
        return height // stride, width // stride

    def num_tokens(self, sample: Sample) -> int:
        """Tokens of a sample without any dropout."""
        return sum(
            2 + (len(s.ids) if isinstance(s, TextSegment) else prod(self.grid(s)))
            for s in sample.segments
        )


def _joined(parts: list[Part]) -> Part:
    """One record of many: tensors and tuples end to end, numbers summed."""
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
        elif isinstance(values[0], tuple):
            joined[field.name] = tuple(chain.from_iterable(values))
        else:
            joined[field.name] = sum(values)
    return type(parts[0])(**joined)


class Packer:
    """Collects samples with `add` and makes one batch of them with `build`."""

    def __init__(self, config: PackerConfig, tokens: SpecialTokens) -> None:
        self.config, self.tokens = config, tokens
        self.sample_lens: list[int] = []
        self.split_lens: list[int] = []
        self.attn_modes: list[AttentionMode] = []
        self.positions: list[int] = []
        self.text: list[TextTokens] = []
        self.labels: list[AnswerLabels] = []
        self.vit: list[VitImages] = []
        self.vae: list[VaeImages] = []

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    def add(self, sample: Sample, generator: torch.Generator, answer_weight: float = 1.0) -> None:
        """Packs one sample; `answer_weight` weighs its answer tokens in the cross-entropy."""
        before, position = self.num_tokens, 0
        for segment in sample.segments:
            if segment.droppable and self._dropped(segment, generator):
                position += not isinstance(segment, TextSegment)
            elif isinstance(segment, TextSegment):
                position = self._add_text(segment, position, answer_weight)
            else:
                position = self._add_image(segment, position, sample.name, generator)
        if self.num_tokens > before:
            self.sample_lens.append(self.num_tokens - before)

    def _dropped(self, segment: Segment, generator: torch.Generator) -> bool:
        probability = {
            TextSegment: self.config.text_cond_dropout_prob,
            VitSegment: self.config.vit_cond_dropout_prob,
            VaeSegment: self.config.vae_cond_dropout_prob,
        }[type(segment)]
        return torch.rand((), generator=generator).item() < probability

    def _add_text(self, segment: TextSegment, position: int, weight: float) -> int:
        ids = [self.tokens.bos, *segment.ids, self.tokens.eos]
        start, end = self.num_tokens, position + len(ids)
        indexes = torch.arange(start, start + len(ids))
        self.text.append(TextTokens(ids=torch.tensor(ids), indexes=indexes))
        if segment.answer:
            self._label(start, ids[1:], weight)
        self._close_split(segment, list(range(position, end)), "causal", weight)
        return end

    def _add_image(
        self, segment: VitSegment | VaeSegment, position: int, name: str, generator: torch.Generator
    ) -> int:
        config, grid, start = self.config, self.config.grid(segment), self.num_tokens
        vit, n = isinstance(segment, VitSegment), prod(grid)
        target = isinstance(segment, VaeSegment) and segment.target
        side = config.vit_max_num_patch_per_side if vit else config.max_latent_size
        ids = position_ids(*grid, side, config.interpolate_pos)
        indexes = torch.arange(start + 1, start + 1 + n)
        if vit:
            patches = patchify(segment.image_pm1, config.vit_patch_size)
            self.vit.append(
                VitImages(patches=patches, position_ids=ids, indexes=indexes, lens=(n,))
            )
        else:
            self.vae.append(
                VaeImages(
                    images=(segment.image_pm1,),
                    grids=(grid,),
                    time_logits=(self._time_logit(generator) if target else CONDITIONING,),
                    noise_seeds=(int(torch.randint(2**62, (), generator=generator)),),
                    names=(name,),
                    position_ids=ids,
                    indexes=indexes,
                )
            )
        ends = torch.tensor([self.tokens.image_start, self.tokens.image_end])
        self.text.append(TextTokens(ids=ends, indexes=torch.tensor([start, start + n + 1])))
        self._close_split(segment, [position] * (n + 2), "noise" if target else "full", 1.0)
        return position if target else position + 1

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

    def _label(self, start: int, ids: list[int], weight: float) -> None:
        """Trains the tokens from `start` on to announce `ids`."""
        self.labels.append(
            AnswerLabels(
                ids=torch.tensor(ids),
                indexes=torch.arange(start, start + len(ids)),
                weights=torch.full((len(ids),), weight),
                total_weight=weight * len(ids),
            )
        )

    def _close_split(
        self, segment: Segment, positions: list[int], mode: AttentionMode, weight: float
    ) -> None:
        self.positions += positions
        self.split_lens.append(len(positions))
        self.attn_modes.append(mode)
        if segment.end_label is not None:
            self._label(self.num_tokens - 1, [segment.end_label], weight)

    def build(self) -> PackedBatch:
        """Raises ValueError when no token was packed."""
        if not self.positions:
            raise ValueError("an empty pack: every segment of every sample was dropped")
        return PackedBatch(
            sample_lens=tuple(self.sample_lens),
            split_lens=tuple(self.split_lens),
            attn_modes=tuple(self.attn_modes),
            position_ids=torch.tensor(self.positions),
            text=_joined(self.text),
            labels=_joined(self.labels) if self.labels else None,
            vit=_joined(self.vit) if self.vit else None,
            vae=_joined(self.vae) if self.vae else None,
        )
