"""Segments -> PackedBatch: samples end to end in one sequence. No I/O; randomness only from the
generator that comes with each sample, so a sample looks the same in whatever pack it lands."""

from dataclasses import dataclass, field

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


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a sample. `droppable` conditions are left out by their dropout probability."""

    droppable: bool = False
    end_label: int | None = None
    """Token that the segment's last token is trained to announce, if any."""


@dataclass(frozen=True, kw_only=True)
class TextSegment(Segment):
    ids: list[int]
    """Without bos and eos."""
    answer: bool = False
    """Trained with cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class VitSegment(Segment):
    image_pm1: Tensor
    """(3, H, W) in [-1, 1], sides multiples of the ViT patch."""


@dataclass(frozen=True, kw_only=True)
class VaeSegment(Segment):
    image_pm1: Tensor
    """(3, H, W) in [-1, 1], sides multiples of the latent stride."""
    target: bool = False
    """Generated (with noise) rather than a condition."""


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
            len(s.ids) + 2 if isinstance(s, TextSegment) else _area(self.grid(s)) + 2
            for s in sample.segments
            if isinstance(s, TextSegment | VitSegment | VaeSegment)
        )


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


@dataclass
class _Images:
    """Image tokens of one kind while they are collected."""

    images: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    position_ids: list[Tensor] = field(default_factory=list)
    indexes: list[Tensor] = field(default_factory=list)
    time_logits: list[float] = field(default_factory=list)
    noise_seeds: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


class Packer:
    """Collects samples with `add` and makes one batch of them with `build`."""

    def __init__(self, config: PackerConfig, tokens: SpecialTokens) -> None:
        self.config, self.tokens = config, tokens
        self.sample_lens: list[int] = []
        self.split_lens: list[int] = []
        self.attn_modes: list[AttentionMode] = []
        self.positions: list[int] = []
        self.text_ids: list[int] = []
        self.text_indexes: list[int] = []
        self.label_ids: list[int] = []
        self.label_indexes: list[int] = []
        self.label_weights: list[float] = []
        self.vit, self.vae = _Images(), _Images()

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
            elif isinstance(segment, VitSegment | VaeSegment):
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

    def _label(self, index: int, label: int, weight: float) -> None:
        self.label_indexes.append(index)
        self.label_ids.append(label)
        self.label_weights.append(weight)

    def _add_text(self, segment: TextSegment, position: int, weight: float) -> int:
        ids = [self.tokens.bos, *segment.ids, self.tokens.eos]
        start = self.num_tokens
        self.text_ids += ids
        self.text_indexes += range(start, start + len(ids))
        if segment.answer:
            for i, label in enumerate(ids[1:]):
                self._label(start + i, label, weight)
        if segment.end_label is not None:
            self._label(start + len(ids) - 1, segment.end_label, weight)
        self._close_split(list(range(position, position + len(ids))), "causal")
        return position + len(ids)

    def _add_image(
        self, segment: VitSegment | VaeSegment, position: int, name: str, generator: torch.Generator
    ) -> int:
        config, grid, start = self.config, self.config.grid(segment), self.num_tokens
        n = _area(grid)
        is_vit = isinstance(segment, VitSegment)
        target = isinstance(segment, VaeSegment) and segment.target
        side = config.vit_max_num_patch_per_side if is_vit else config.max_latent_size
        images = self.vit if is_vit else self.vae
        images.images.append(segment.image_pm1)
        images.grids.append(grid)
        images.position_ids.append(position_ids(*grid, side, config.interpolate_pos))
        images.indexes.append(torch.arange(start + 1, start + 1 + n))
        images.names.append(name)
        if not is_vit:
            images.time_logits.append(self._time_logit(generator) if target else CONDITIONING)
            images.noise_seeds.append(int(torch.randint(2**62, (), generator=generator)))
        self.text_ids += [self.tokens.image_start, self.tokens.image_end]
        self.text_indexes += [start, start + n + 1]
        if segment.end_label is not None:
            self._label(start + n + 1, segment.end_label, 1.0)
        self._close_split([position] * (n + 2), "noise" if target else "full")
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

    def _close_split(self, positions: list[int], mode: AttentionMode) -> None:
        self.positions += positions
        self.split_lens.append(len(positions))
        self.attn_modes.append(mode)

    def build(self) -> PackedBatch:
        """Raises ValueError when no token was packed."""
        if not self.positions:
            raise ValueError("an empty pack: every segment of every sample was dropped")
        return PackedBatch(
            sample_lens=tuple(self.sample_lens),
            split_lens=tuple(self.split_lens),
            attn_modes=tuple(self.attn_modes),
            position_ids=torch.tensor(self.positions),
            text=TextTokens(
                ids=torch.tensor(self.text_ids), indexes=torch.tensor(self.text_indexes)
            ),
            labels=self._labels(),
            vit=self._vit(),
            vae=self._vae(),
        )

    def _labels(self) -> AnswerLabels | None:
        if not self.label_ids:
            return None
        return AnswerLabels(
            ids=torch.tensor(self.label_ids),
            indexes=torch.tensor(self.label_indexes),
            weights=torch.tensor(self.label_weights),
            total_weight=sum(self.label_weights),
        )

    def _vit(self) -> VitImages | None:
        if not self.vit.images:
            return None
        patch = self.config.vit_patch_size
        return VitImages(
            patches=torch.cat([patchify(image, patch) for image in self.vit.images]),
            position_ids=torch.cat(self.vit.position_ids),
            indexes=torch.cat(self.vit.indexes),
            lens=tuple(_area(grid) for grid in self.vit.grids),
        )

    def _vae(self) -> VaeImages | None:
        if not self.vae.images:
            return None
        return VaeImages(
            images=tuple(self.vae.images),
            grids=tuple(self.vae.grids),
            time_logits=tuple(self.vae.time_logits),
            noise_seeds=tuple(self.vae.noise_seeds),
            names=tuple(self.vae.names),
            position_ids=torch.cat(self.vae.position_ids),
            indexes=torch.cat(self.vae.indexes),
        )
