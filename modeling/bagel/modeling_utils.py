"""Small parts of BAGEL: position table, time embedder, connector."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

TIME_FREQUENCIES = 128
MAX_PERIOD = 10_000.0
Rope = tuple[Tensor, Tensor]
"""Cosines and sines (S, 1, E) float32 of S tokens and head size E, the same in both halves but for
the sign of the sines, which is that of the rotation: negative in the first half."""


def _sin_cos(position: Tensor, channels: int) -> Tensor:
    """(n,) positions -> (n, channels): sines then cosines of geometric frequencies, float64."""
    omega = torch.arange(channels // 2, dtype=torch.float64) / (channels / 2)
    angle = position.double()[:, None] * (1.0 / MAX_PERIOD**omega)[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sin_cos_table(side: int, channels: int) -> Tensor:
    """(side * side, channels) float32: half of the channels from the column, half from the row."""
    index = torch.arange(side * side)
    half = channels // 2
    return torch.cat([_sin_cos(index % side, half), _sin_cos(index // side, half)], dim=1).float()


FEW_TOKENS = 64
"""Of a decoding step, whose calls cost more than their arithmetic."""


def _rotated(x_SHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, half = x_SHE.float(), x_SHE.shape[-1] // 2
    out = x * cos
    if len(x) <= FEW_TOKENS:  # one more pass, but fewer calls
        out.addcmul_(x.roll(half, -1), sin)
    else:
        out[..., :half].addcmul_(x[..., half:], sin[..., :half])
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out.to(x_SHE.dtype)


def signed(sin: Tensor) -> Tensor:
    """Sines (..., E) with the sign of the rotation."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation back; nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x_SHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_SHE, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def apply_rope(x_SHE: Tensor, rope: Rope) -> Tensor:
    """Half-rotation of every head by the angles of its token, computed in float32."""
    # Without a graph the function around it would cost as much as the rotation of a few tokens.
    return _Rotate.apply(x_SHE, *rope) if torch.is_grad_enabled() else _rotated(x_SHE, *rope)


class PositionEmbedding(nn.Module):
    """Fixed 2-D sin-cos table; in the state dict, never trained."""

    pos_embed: Tensor

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("pos_embed", sin_cos_table(side, channels))

    def forward(self, position_ids: Tensor) -> Tensor:
        """(n,) int64 -> (n, channels)."""
        return self.pos_embed[position_ids]


class TimestepEmbedder(nn.Module):
    """t in [0, 1] (not scaled) -> hidden."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        """(n,) float32 -> (n, hidden)."""
        i = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * i / TIME_FREQUENCIES)
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(features.to(next(self.parameters()).dtype))


class MLPConnector(nn.Module):
    """ViT features -> hidden size of the language model."""

    def __init__(self, in_dim: int, out_dim: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)
        self.act = ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
