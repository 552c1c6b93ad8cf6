"""Exponential moving average of the weights, in float32 whatever the weights' dtype.

In bfloat16 an update of (1 - decay) is lost to rounding: with decay 0.9999 the average stalls.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """`average <- decay * average + (1 - decay) * weight`, for trained weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.averages = {n: p.detach().float().clone() for n, p in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        weights = [p.detach().float() for p in self.weights.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self.decay)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with the averages in place of the trained weights."""
        return model.state_dict() | self.averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError when a trained weight is not in the state."""
        for name, average in self.averages.items():
            average.copy_(state[name])
