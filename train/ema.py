"""Exponential moving average of the weights, in float32 whatever the model computes in.

In bfloat16 an update of (1 - decay) is lost to rounding: with decay 0.9999 the average stalls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """`average <- decay * average + (1 - decay) * weight`, sharded as the weights are."""

    def __init__(
        self, masters: list[Tensor], decay: float, refresh: Callable[[], None] = lambda: None
    ) -> None:
        """`masters` are this rank's float32 shards of the trained weights; `refresh` brings a
        changed master to the model, where that is a copy."""
        self.masters, self.decay, self.refresh = masters, decay, refresh
        self.averages = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """`skip` is a scalar on the device: 1 leaves every average as it is, to the bit."""
        share = (1 - self.decay) * (1 - skip.to(self.masters[0].device))
        torch._foreach_lerp_(self.averages, self.masters, [share] * len(self.masters))

    @torch.no_grad()
    def restart(self) -> None:
        """The averages start from the weights as they are now."""
        torch._foreach_copy_(self.averages, self.masters)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model with the averages as its weights; afterwards as before, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for master, average in zip(self.masters, self.averages, strict=True):
            weight = master.clone()
            master.copy_(average)
            average.copy_(weight)
        self.refresh()
