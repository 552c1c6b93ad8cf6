"""Steps that must not happen: non-finite ones, and spikes of the gradient norm.

Whether a step is skipped is decided on the device, alike on all ranks, so that the host has to wait
for it at log steps only.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modeling.bagel.losses import LossTerm
from modeling.batch import PackedBatch

from .distributed import MAX, all_gather, all_reduce, rank

NORM_MEMORY = 0.98
"""Weight of the past in mean and mean square of the gradient norm."""
COUNTERS = ("nonfinite_steps", "in_a_row", "longest_row", "spikes", "seen", "mean", "square")


class NonFiniteError(FloatingPointError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Guard:
    """Judges every step; tells at the next log step what was wrong."""

    def __init__(
        self, most_in_a_row: int, sigma: float | None, warmup: int, device: torch.device
    ) -> None:
        """The run ends after `most_in_a_row` non-finite steps. A norm more than `sigma` standard
        deviations above its mean is skipped after `warmup` steps; None skips none. Where norms
        stay high the mean follows."""
        self.most_in_a_row, self.sigma, self.warmup = most_in_a_row, sigma, warmup
        self.counters = {name: torch.zeros((), device=device) for name in COUNTERS}
        self.told = 0.0
        self.window: list[tuple[int, list[str], Tensor]] = []
        """Steps since the last log line: number, labels, which of them are not finite."""

    @torch.no_grad()
    def judge(
        self, step: int, norm: Tensor, batches: list[PackedBatch], found: list[dict[str, LossTerm]]
    ) -> Tensor:
        """1 (float32, on the device) if the step is to be skipped, else 0; the same on all ranks.

        `norm` is the global norm of the gradient.
        """
        values = {"gradient norm": norm}
        for terms in found:
            for name, term in terms.items():
                values[name] = values.get(name, 0.0) + term.sum
                values |= {f"{name} of image {i.image.name}": i.loss for i in term.images}
        own = ~torch.stack([value.detach().float() for value in values.values()]).isfinite()
        images = [name for b in batches if b.vae is not None for name in dict.fromkeys(b.vae.names)]
        self.window.append((step, [*values, f"images {', '.join(images)}"], own))
        bad = all_reduce(own.any().float(), MAX)
        c = self.counters
        deviation = (c["square"] - c["mean"].square()).clamp(min=0).sqrt()
        limit = torch.full_like(norm, torch.inf)
        if self.sigma is not None:
            warm = c["seen"] >= max(self.warmup, 2)  # a deviation needs two norms
            limit = torch.where(warm, c["mean"] + self.sigma * deviation, limit)
        spike = (1 - bad) * (norm > limit)
        skip = bad + spike
        # A spike counts as the limit: where norms stay high, the limit follows them.
        learned = torch.where(bad > 0, c["mean"], torch.minimum(norm, limit))
        # At first the plain mean, so that no single norm outweighs the others.
        weight = (1 / (c["seen"] + 1)).clamp(min=1 - NORM_MEMORY) * (1 - bad)
        c["mean"].lerp_(learned, weight)
        c["square"].lerp_(learned.square(), weight)
        c["seen"] += 1 - bad
        c["spikes"] += spike
        c["nonfinite_steps"] += bad
        c["in_a_row"].add_(1).mul_(bad)
        c["longest_row"].copy_(torch.maximum(c["longest_row"], c["in_a_row"]))
        return skip

    def end_window(self) -> dict[str, float]:
        """Numbers for the log line. Prints what was skipped; every rank has to call it.

        Raises NonFiniteError on all ranks, naming steps, terms, images and ranks.
        """
        state = self.state_dict()
        shown = {name: state[name] for name in ("nonfinite_steps", "spikes")}
        window, self.window = self.window, []
        self.counters["longest_row"].zero_()
        if state["nonfinite_steps"] == self.told:
            return shown
        self.told = state["nonfinite_steps"]
        own = []
        for step, labels, flags in window:
            guilty = [label for label, bad in zip(labels, flags.tolist(), strict=False) if bad]
            if guilty:
                own.append(f"step {step}, rank {rank()}: {', '.join(guilty)} ({labels[-1]})")
        text = "not finite, skipped: " + " | ".join(o for part in all_gather(own) for o in part)
        if state["longest_row"] >= self.most_in_a_row:
            raise NonFiniteError(f"{text}; max_nonfinite_steps={self.most_in_a_row} in a row")
        if rank() == 0:
            print(f"WARNING: {text}", flush=True)
        return shown

    def state_dict(self) -> dict[str, float]:
        return dict(zip(COUNTERS, torch.stack(list(self.counters.values())).tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        for name, value in state.items():
            self.counters[name].fill_(value)
        self.told = state["nonfinite_steps"]
