"""Packed attention: masks of causal, full and noise splits, and the back ends that apply them.

A query may see a key when both lie in one sample, and (the key is not later, or both lie in the
same full or noise split), and the key is not in another noise split.

Shape legend: S tokens, Hq query heads, Hk key heads (Hq a multiple of Hk), E head size.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .batch import AttentionMode

Lens = Sequence[int]
Modes = Sequence[AttentionMode]
Device = torch.device | str


class Attention(Protocol):
    """What decoder layers call: `layer` lets a cache find its keys and values."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


def head_rows(q_SHE: Tensor, groups: int) -> Tensor:
    """(S, Hq, E) -> (Hk, S * groups, E): queries of a group are rows of one product with their
    key head."""
    return q_SHE.unflatten(1, (-1, groups)).transpose(0, 1).flatten(1, 2)


def row_heads(rows: Tensor, groups: int) -> Tensor:
    """(Hk, S * groups, E) -> (S, Hq, E), the way back."""
    return rows.unflatten(1, (-1, groups)).transpose(0, 1).flatten(1, 2)


def grouped_sdpa(
    q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention of one sequence; key heads are shared by views, never copied.

    `mask` (queries, keys) is True where a query sees a key. Returns (queries, Hq, E).
    """
    groups = q_SHE.shape[1] // k_SHE.shape[1]
    if mask is None and not causal:
        q, k, v = head_rows(q_SHE, groups), k_SHE.transpose(0, 1), v_SHE.transpose(0, 1)
        return row_heads(F.scaled_dot_product_attention(q[None], k[None], v[None])[0], groups)
    # (Hk, groups, S, E): the key heads are the batch, so that expanding over groups is a view.
    q = q_SHE.unflatten(1, (-1, groups)).permute(1, 2, 0, 3)
    k, v = (x.permute(1, 0, 2)[:, None].expand(-1, groups, -1, -1) for x in (k_SHE, v_SHE))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _token_splits(split_lens: Lens, modes: Modes) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: its split (int64), whether that is noise, whether it sees itself both ways."""
    lens = torch.tensor(split_lens)
    flags = torch.tensor([(m == "noise", m != "causal") for m in modes]).repeat_interleave(lens, 0)
    return torch.arange(len(lens)).repeat_interleave(lens), flags[:, 0], flags[:, 1]


def split_mask(split_lens: Lens, modes: Modes, device: Device) -> Tensor:
    """(n, n) bool mask of one sample, True where the row (query) sees the column (key)."""
    split, noise, both_ways = _token_splits(split_lens, modes)
    index = torch.arange(len(split))
    same_split = split[:, None] == split[None, :]
    visible = (index[:, None] >= index[None, :]) | (same_split & both_ways[:, None])
    visible &= same_split | ~noise[None, :]
    return visible.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Queries:
    """One split's queries, and which keys of its sample they may see."""

    sample: int
    num_keys: int
    """Keys of the sample up to the end of the split."""
    mask: Tensor | None
    """(queries, num_keys) bool; None where all are seen, or where `causal` says which."""
    causal: bool
    constant: bool
    """No query of the split passes on a gradient."""


class PackedAttention:
    """Attention of a packed sequence, one `scaled_dot_product_attention` a split.

    Queries meet the keys up to the end of their split, and no mask where they see all of these.
    The cost is linear in the number of samples; masks are built once and shared by all layers.
    """

    def __init__(
        self,
        sample_lens: Lens,
        split_lens: Lens,
        modes: Modes,
        device: Device,
        learned: Collection[int] | None = None,
    ) -> None:
        """`learned` are the splits whose outputs pass on a gradient; None means all."""
        self.sample_lens, self.split_lens = list(sample_lens), list(split_lens)
        ends = list(accumulate(split_lens, initial=0))
        splits = [ends.index(end) for end in accumulate(sample_lens, initial=0)]
        self.queries = []
        for sample, (first, last) in enumerate(pairwise(splits)):
            visible = split_mask(split_lens[first:last], modes[first:last], "cpu")
            for i in range(first, last):
                begin, end = ends[i] - ends[first], ends[i + 1] - ends[first]
                rows = visible[begin:end, :end]
                # A kernel's own causal mode is faster than a mask.
                causal = begin == 0 and modes[i] == "causal"
                mask = None if causal or rows.all() else rows.to(device, non_blocking=True)
                constant = learned is not None and i not in learned
                self.queries.append(_Queries(sample, end, mask, causal, constant))

    @torch.compiler.disable
    def __call__(self, layer: int, q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor) -> Tensor:
        keys, values = k_SHE.split(self.sample_lens), v_SHE.split(self.sample_lens)
        parts = []
        if all(s.constant for s in self.queries):
            # No rows, but all weights still get a gradient, as on ranks that have images.
            parts.append(q_SHE[:0] + k_SHE[:0].sum() + v_SHE[:0].sum())
        for q, s in zip(q_SHE.split(self.split_lens), self.queries, strict=True):
            k, v = keys[s.sample][: s.num_keys], values[s.sample][: s.num_keys]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not s.constant):
                parts.append(grouped_sdpa(q, k, v, s.mask, s.causal))
        return torch.cat(parts)


class FlexPackedAttention:
    """The same through flex attention and a block mask: one compiled kernel on a GPU."""

    def __init__(
        self,
        sample_lens: Lens,
        split_lens: Lens,
        modes: Modes,
        device: Device,
        learned: Collection[int] | None = None,
    ) -> None:
        """`learned` is not used: one kernel serves all tokens."""
        samples = torch.arange(len(sample_lens)).repeat_interleave(torch.tensor(sample_lens))
        sample, split, noise, both_ways = (
            x.to(device) for x in (samples, *_token_splits(split_lens, modes))
        )

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same_split = split[q] == split[k]
            ordered = (q >= k) | (same_split & both_ways[q])
            return (sample[q] == sample[k]) & ordered & (same_split | ~noise[k])

        n = len(sample)
        self.block_mask = create_block_mask(visible, None, None, n, n, device=str(device))
        self.kernel = torch.compile(flex_attention) if sample.is_cuda else flex_attention

    def __call__(self, layer: int, q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_SHE, k_SHE, v_SHE))
        out = self.kernel(q, k, v, block_mask=self.block_mask, enable_gqa=True)
        return out[0].transpose(0, 1)


BACKENDS: dict[str, type[PackedAttention] | type[FlexPackedAttention]] = {
    "sdpa": PackedAttention,
    "flex": FlexPackedAttention,
}
"""`sdpa` runs everywhere, `flex` on GPUs."""
