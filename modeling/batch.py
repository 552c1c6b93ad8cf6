"""PackedBatch: the one contract between data, model and losses.

Several samples lie end to end in one sequence of S tokens. A sample is a row of *splits*, each
with an attention mode: `causal` (text), `full` (a ViT or conditioning image, attends to itself
both ways) or `noise` (a target image, which later splits cannot see).

Shape legend: S sequence tokens, T text tokens, N answer tokens, P ViT patches, L latent tokens,
I VAE images. `indexes` are int64 places in the sequence; tuples hold what the host must know.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Self

import torch
from torch import Tensor

from .flow import CONDITIONING, time_from_logit

AttentionMode = Literal["causal", "full", "noise"]


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of `<|im_start|>`, `<|im_end|>`, `<|vision_start|>`, `<|vision_end|>`."""

    bos: int
    eos: int
    image_start: int
    image_end: int


class TensorRecord:
    """A frozen dataclass whose tensors, also nested ones, move together."""

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(
            self,  # type: ignore[type-var]
            **{f.name: _map(getattr(self, f.name), fn) for f in dataclasses.fields(self)},  # type: ignore[arg-type]
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self.map_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self.map_tensors(Tensor.pin_memory)


def _map(value: object, fn: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, TensorRecord):
        return value.map_tensors(fn)
    if isinstance(value, tuple):
        return tuple(_map(v, fn) for v in value)
    return value


@dataclass(frozen=True, kw_only=True)
class TextTokens(TensorRecord):
    ids: Tensor
    """(T,) int64 token ids, the start and end tokens of images included."""
    indexes: Tensor
    """(T,)"""


@dataclass(frozen=True, kw_only=True)
class AnswerLabels(TensorRecord):
    ids: Tensor
    """(N,) int64: the token to predict at each index."""
    indexes: Tensor
    """(N,)"""
    weights: Tensor
    """(N,) float32, 1 unless answers are reweighted."""
    total_weight: float
    """Sum of the weights, on the host."""


@dataclass(frozen=True, kw_only=True)
class VitImages(TensorRecord):
    patches: Tensor
    """(P, patch * patch * 3) float32 in [-1, 1]."""
    position_ids: Tensor
    """(P,) int64 rows of the ViT position table."""
    indexes: Tensor
    """(P,)"""
    lens: tuple[int, ...]
    """Patches of each image."""


@dataclass(frozen=True, kw_only=True)
class VaeImages(TensorRecord):
    images: tuple[Tensor, ...]
    """I tensors (3, H_i, W_i) float32 in [-1, 1], each at its own size."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of latent tokens of each image."""
    time_logits: tuple[float, ...]
    """t before the sigmoid and the shift; -inf marks a conditioning image."""
    noise_seeds: tuple[int, ...]
    """Seed of each image's noise, so that the noise does not depend on the packing."""
    names: tuple[str, ...]
    """Sample of each image, for messages."""
    splits: tuple[int, ...]
    """Split of each image."""
    position_ids: Tensor
    """(L,) int64 rows of the latent position table."""
    indexes: Tensor
    """(L,)"""

    @property
    def lens(self) -> tuple[int, ...]:
        """Latent tokens of each image."""
        return tuple(h * w for h, w in self.grids)

    @property
    def is_target(self) -> tuple[bool, ...]:
        return tuple(logit != CONDITIONING for logit in self.time_logits)

    @property
    def num_target_tokens(self) -> int:
        return sum(n for n, target in zip(self.lens, self.is_target, strict=True) if target)

    def times(self, shift: float) -> tuple[float, ...]:
        """Shifted times in [0, 1], 0 for conditioning images."""
        return tuple(time_from_logit(logit, shift) for logit in self.time_logits)

    def target_tokens(self) -> Tensor:
        """(num_target_tokens,) int64 places of the target tokens among the L latent tokens."""
        ends = accumulate(self.lens)
        spans = [
            torch.arange(end - n, end)
            for end, n, target in zip(ends, self.lens, self.is_target, strict=True)
            if target
        ]
        empty = torch.zeros(0, dtype=torch.int64)
        return torch.cat([empty, *spans]).to(self.indexes.device, non_blocking=True)


PER_IMAGE = ("images", "grids", "time_logits", "noise_seeds", "names", "splits")
"""Fields of VaeImages with an entry for each image."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch(TensorRecord):
    sample_lens: tuple[int, ...]
    split_lens: tuple[int, ...]
    attn_modes: tuple[AttentionMode, ...]
    position_ids: Tensor
    """(S,) int64 rope positions, from 0 in every sample."""
    text: TextTokens
    labels: AnswerLabels | None = None
    vit: VitImages | None = None
    vae: VaeImages | None = None

    def __post_init__(self) -> None:
        length, vit, vae = self.num_tokens, self.vit, self.vae
        images = [getattr(vae, name) for name in PER_IMAGE] if vae else []
        kinds = [self.text.ids, *([vit.patches] if vit else []), *([vae.indexes] if vae else [])]
        ends = [set(accumulate(lens)) for lens in (self.split_lens, self.sample_lens)]
        consistent = {
            "split_lens": sum(self.split_lens) == length,
            "sample and split ends": ends[0] >= ends[1],
            "attn_modes": len(self.attn_modes) == len(self.split_lens),
            "names of attn_modes": set(self.attn_modes) <= {"causal", "full", "noise"},
            "position_ids": self.position_ids.shape == (length,),
            "vit.lens": vit is None or sum(vit.lens) == len(vit.patches),
            "vae.grids": vae is None or sum(vae.lens) == len(vae.indexes),
            "vae.splits": vae is None or {*vae.splits} <= {*range(len(self.split_lens))},
            "fields per VAE image": len({len(f) for f in images}) <= 1,
            "tokens of all kinds": sum(map(len, kinds)) == length,
        }
        if broken := [name for name, holds in consistent.items() if not holds]:
            raise ValueError(f"PackedBatch: inconsistent {', '.join(broken)} ({length} tokens)")

    @property
    def num_tokens(self) -> int:
        return sum(self.sample_lens)
