"""Rectified flow: straight paths from the clean latent z0 (t = 0) to noise (t = 1).

z_t = (1 - t) z0 + t e, with velocity v = e - z0 (Liu et al. 2022, Lipman et al. 2022).
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", float, Tensor)

CONDITIONING = -math.inf
"""Time logit of an image that conditions: sigmoid(-inf) = 0, so it carries no noise."""


def shift_time(t: T, shift: float) -> T:
    """t in [0, 1] warped towards noise for shift > 1: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def time_from_logit(logit: float, shift: float) -> float:
    """Shifted time in [0, 1] of a time logit (0 for `CONDITIONING`, 1 for +inf)."""
    t = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    return shift_time(t, shift)


def unshift_time(t: float, shift: float) -> float:
    """The inverse of `shift_time`."""
    return t / (shift - (shift - 1) * t)


def logit_from_time(t: float, shift: float) -> float:
    """The inverse of `time_from_logit` for t in (0, 1]."""
    unshifted = unshift_time(t, shift)
    return math.log(unshifted / (1 - unshifted)) if unshifted < 1 else math.inf


def interpolate(z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t; `t` in [0, 1] is broadcast against the latents."""
    return (1 - t) * z0 + t * noise


def velocity(z0: Tensor, noise: Tensor) -> Tensor:
    """The constant velocity of the path, of the latents' shape."""
    return noise - z0


def clean_from_velocity(z_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The clean latent that a (predicted) velocity at time t implies: z_t - t v."""
    return z_t - t * v


def gate(t: float, max_t: float) -> float:
    """Weight of an image at time t in pixel-space losses: clamp((max_t - t) / max_t, 0, 1)."""
    return min(max((max_t - t) / max_t, 0.0), 1.0)


def euler_times(num_timesteps: int, shift: float) -> list[float]:
    """Decreasing shifted times from 1 to 0; `num_timesteps - 1` Euler steps lie between them."""
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps={num_timesteps}: at least 2 are needed for one step")
    return shift_time(torch.linspace(1, 0, num_timesteps), shift).tolist()
