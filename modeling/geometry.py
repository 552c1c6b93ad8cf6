"""Patches and 2-D positions: pure functions shared by data, training and inference.

Shape legend: C channels, H = h * p and W = w * p pixels (or latents), p patch side, D = p * p * C.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def token_grid(shape: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image (..., H, W), `stride` pixels along each side.

    Raises ValueError when a side is no multiple of `stride`.
    """
    height, width = shape[-2:]
    if height % stride or width % stride:
        raise ValueError(f"image {height}x{width} is no multiple of the stride {stride}")
    return height // stride, width // stride


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """(C, h*p, w*p) -> (h*w, p*p*C): `c (h p) (w q) -> (h w) (p q c)`."""
    channels, (h, w) = len(image_CHW), token_grid(image_CHW.shape, patch)
    grid = image_CHW.reshape(channels, h, patch, w, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(h * w, patch * patch * channels)


def unpatchify(tokens_LD: Tensor, h: int, w: int, patch: int) -> Tensor:
    """(h*w, p*p*C) -> (C, h*p, w*p), the inverse of `patchify`."""
    channels = tokens_LD.shape[-1] // patch**2
    grid = tokens_LD.reshape(h, w, patch, patch, channels)
    return grid.permute(4, 0, 2, 1, 3).reshape(channels, h * patch, w * patch)


def position_ids(h: int, w: int, side: int, interpolate: bool = False) -> Tensor:
    """Row-major ids (h*w,) int64 into a table of side x side positions: row * side + column.

    With `interpolate` row i of h falls into the bucket of i / h among the edges 1/side, 2/side, ...
    (a value on an edge belongs to the upper bucket), columns likewise. Raises ValueError when the
    grid does not fit the table.
    """
    if max(h, w) > side and not interpolate:
        raise ValueError(f"a grid of {h}x{w} patches does not fit a position table of side {side}")
    rows, columns = (_coordinates(n, side, interpolate) for n in (h, w))
    return (rows[:, None] * side + columns[None, :]).flatten()


def _coordinates(n: int, side: int, interpolate: bool) -> Tensor:
    index = torch.arange(n)
    return index * side // n if interpolate else index
