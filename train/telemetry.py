"""What every loss term does to the predicted velocity: a poisoned gradient shows here first.

The loss of a pixel-space term is bounded, its gradient is not. Gradients are those of the weighted
terms, over all micro-batches and ranks of a step.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modeling.bagel.losses import LossTerm
from modeling.bagel.pixel_space import ImageLoss
from modeling.batch import PackedBatch

from .distributed import MAX, all_reduce, debugged_terms, rank
from .metrics import Metrics

REFERENCE = "mse"
"""The term that gradients are compared with."""


class Telemetry:
    """Looks at the gradients of a step, writes them to the metrics, and warns."""

    def __init__(self, watched: list[str], unseen_steps: int, most_ratio: float) -> None:
        """`watched` are the terms that see some images only.

        Worth a warning: one of them without any image for `unseen_steps`, or with a gradient
        beyond `most_ratio` times the reference's.
        """
        self.watched, self.unseen_steps, self.most_ratio = watched, unseen_steps, most_ratio
        self.debugged = debugged_terms(watched)
        self.steps_without = dict.fromkeys(watched, 0)
        self.looked_at: set[str] = set()
        """Terms whose gradient this log window has."""

    def begin_step(self, counts: Mapping[str, float], scales: Mapping[str, float]) -> bool:
        """Whether the model is to keep the gradients of this step: the same on every rank.

        A single watched term has its gradient anyway. Several need a backward each, so they are
        looked at in the first step of a log window in which one of them has an image.
        """
        self.scales = scales
        self.images = dict.fromkeys([REFERENCE, *self.watched], 0)
        self.targets = 0
        self.clamped: dict[str, list[Tensor]] = {}
        self.squares: dict[str, Tensor] = {}
        self.largest: dict[str, Tensor] = {}
        self.seen = seen = {name for name in self.watched if counts.get(name, 0) > 0}
        for name in self.watched:
            self.steps_without[name] = 0 if name in seen else self.steps_without[name] + 1
            if self.steps_without[name] and self.steps_without[name] % self.unseen_steps == 0:
                _warn(
                    f"{name} has seen no image for {self.steps_without[name]} steps: raise its "
                    "max_t or pixel_space_t_fraction"
                )
        new = (seen | ({REFERENCE} & counts.keys())) - self.looked_at
        self.looked_at |= new
        self.observed = bool(new or self.debugged or (seen and len(self.watched) == 1))
        return self.observed

    def add(self, step: int, batch: PackedBatch, terms: Mapping[str, LossTerm]) -> None:
        """One micro-batch. Prints a line for every image of a debugged term."""
        self.targets += 0 if batch.vae is None else sum(batch.vae.is_target)
        for name, term in terms.items():
            if name in self.images:
                self.images[name] += len(term.images)
            self.clamped[name] = self.clamped.get(name, []) + [
                image.clamped_share for image in term.images if image.clamped_share is not None
            ]
            if term.gradient is None or not term.images:
                continue
            gradient = self.scales[name] * term.gradient
            square, largest = gradient.square().sum(), gradient.abs().amax()
            self.squares[name] = self.squares.get(name, 0.0) + square
            self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)
            if name in self.debugged:
                for image in term.images:
                    line = _image_line(name, image, gradient[image.image.tokens])
                    print(f"{name.upper()}_LOSS_DEBUG step {step} rank {rank()} {line}", flush=True)

    def end_step(self, metrics: Metrics, device: torch.device) -> None:
        """Writes what was looked at; every rank enters its collectives."""
        metrics.add_totals({f"{name}_images": count for name, count in self.images.items()})
        for name, count in self.images.items():
            metrics.add(f"{name}_share", count, self.targets)
        for name, shares in self.clamped.items():
            if shares:
                metrics.add(f"{name}_clamped", torch.stack(shares).sum(), len(shares))
        if not self.observed:
            return
        names = list(self.scales)
        zero = torch.zeros((), device=device)
        squares = all_reduce(torch.stack([self.squares.get(n, zero) for n in names]))
        largest = all_reduce(torch.stack([self.largest.get(n, zero) for n in names]), MAX)
        norms = dict(zip(names, squares.sqrt(), strict=True))
        for name, most in zip(names, largest, strict=True):
            if name == REFERENCE or name in self.seen:
                metrics.add(f"{name}_grad_norm", norms[name])
                metrics.add_largest(f"{name}_grad_max", most)
            if name in self.seen and REFERENCE in norms:
                ratio = norms[name] / norms[REFERENCE]
                metrics.add_largest(f"{name}_grad_ratio", ratio.nan_to_num())

    def end_window(self, line: Mapping[str, float]) -> None:
        """Warns of what the log line shows."""
        self.looked_at = set()
        for name in self.watched:
            ratio = line.get(f"{name}_grad_ratio", 0.0)
            if ratio > self.most_ratio:
                _warn(
                    f"the {name} gradient at the velocity is {ratio:.1f} times that of "
                    f"{REFERENCE} (pixel_space_max_ratio={self.most_ratio:g}): lower its weight "
                    "or set pixel_space_balance"
                )


def warn_if_untrained(terms: Mapping[str, LossTerm], vocab_size: int) -> None:
    """A first cross-entropy near ln(vocabulary) is that of random weights; rank 0 says so."""
    if rank() > 0 or "ce" not in terms or not terms["ce"].count:
        return
    found, random = terms["ce"].sum.item() / terms["ce"].count, math.log(vocab_size)
    if found > 0.9 * random:
        _warn(
            f"the first cross-entropy is {found:.2f}; random weights give {random:.2f}. THE "
            "WEIGHTS LOOK UNTRAINED."
        )


def _image_line(name: str, seen: ImageLoss, gradient: Tensor) -> str:
    height, width = seen.image.image_pm1.shape[-2:]
    value = f"ssim {1 - seen.loss:.6f}" if name == "ssim" else f"loss {seen.loss:.6f}"
    clamped = 0.0 if seen.clamped_share is None else seen.clamped_share
    return (
        f"{seen.image.name} {height}x{width} t {seen.image.t:.4f} gate {seen.gate:.4f} {value} "
        f"grad_norm {gradient.norm():.3e} grad_max {gradient.abs().max():.3e} "
        f"clamped {clamped:.2%}"
    )


def _warn(message: str) -> None:
    print(f"WARNING: {message}", flush=True)
