"""The training loop. One step fits on one screen and knows no loss and no model by name."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from data.loader import PackedLoader
from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import LossTerm
from modeling.batch import PackedBatch

from .arguments import RunArguments
from .checkpoint import load_checkpoint, save_checkpoint
from .distributed import all_gather, rank, sum_over_ranks, world_size
from .ema import EMA
from .metrics import Metrics
from .telemetry import Telemetry


class NonFiniteError(FloatingPointError):
    """A loss term or the gradient norm is not finite."""


@dataclass
class Trainer:
    """Everything a run consists of; `fit` runs it to `total_steps`."""

    args: RunArguments
    model: Bagel
    loader: PackedLoader
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    ema: EMA
    weights: dict[str, float]
    """Weight of every loss term."""
    telemetry: Telemetry
    device: torch.device
    step: int = 0

    @property
    def run(self) -> Path:
        return Path(self.args.training.checkpoint_dir)

    def fit(self) -> None:
        args = self.args.training
        batches = iter(self.loader)
        with Metrics(self.run / "metrics.jsonl", self.step, args.total_steps) as metrics:
            while self.step < args.total_steps:
                self.train_step(batches, metrics)
                self.step += 1
                last = self.step == args.total_steps
                if self.step % args.log_every == 0 or last:
                    self.telemetry.end_window(metrics.log(self.step))
                if self.step % args.save_every == 0 or last:
                    self.save()

    def train_step(self, batches: Iterator[PackedBatch], metrics: Metrics) -> None:
        """Fetch, count, forward, weigh, backward, clip, step, average."""
        args = self.args.training
        micro_batches = [
            next(batches).to(self.device, non_blocking=True)
            for _ in range(args.gradient_accumulation_steps)
        ]
        counts = self.global_counts(micro_batches)
        # A count of 0 comes with a sum of exactly 0.
        scales = {name: self.weights[name] / (count or 1.0) for name, count in counts.items()}
        for name, count in counts.items():
            metrics.add(f"{name}_count", count)
        observe = self.telemetry.begin_step(counts, scales)
        self.optimizer.zero_grad()
        found: list[dict[str, LossTerm]] = []
        for batch in micro_batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                terms = self.model(batch, scales=scales, observe=observe)
            loss = sum((scales[n] * term.sum for n, term in terms.items()), torch.zeros(()))
            if loss.requires_grad:  # not without terms, nor with all that they touch frozen
                loss.backward()
            for name, term in terms.items():
                metrics.add(name, term.sum, term.count)
                metrics.add(f"{name}_weighted", self.weights[name] * term.sum, term.count)
            metrics.add("tokens", batch.num_tokens, 1 / (len(micro_batches) * world_size()))
            self.telemetry.add(self.step, batch, terms)
            found.append(terms)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        self.require_finite(norm, micro_batches, found)
        self.telemetry.end_step(metrics, self.device)
        metrics.add("lr", self.schedule.get_last_lr()[0])
        metrics.add("total_norm", norm)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update()
        if self.step == 0:
            self.warn_if_untrained(found[0])

    def global_counts(self, batches: list[PackedBatch]) -> dict[str, float]:
        """Counts over all micro-batches and ranks; what no batch has anything for is absent.

        Raises ValueError when that is every term.
        """
        shift = self.model.config.timestep_shift
        found = [self.model.losses.counts(batch, shift) for batch in batches]
        counts = [sum(c.get(name, 0.0) for c in found) for name in self.weights]
        holders = [float(sum(name in c for c in found)) for name in self.weights]
        totals = sum_over_ranks(counts + holders, self.device)
        present = {
            name: total
            for name, total, there in zip(
                self.weights, totals[: len(counts)], totals[len(counts) :], strict=True
            )
            if there
        }
        if not present:
            raise ValueError(
                f"step {self.step}: nothing to train on: no sample of the batch has anything for "
                f"{', '.join(self.weights)}"
            )
        return present

    def require_finite(
        self, norm: Tensor, batches: list[PackedBatch], found: list[dict[str, LossTerm]]
    ) -> None:
        """Raises NonFiniteError on all ranks, before any weight has moved, naming the terms, their
        images and the ranks."""
        sums = torch.stack(
            [norm, *(term.sum.detach() for terms in found for term in terms.values())]
        )
        bad = sum_over_ranks([float(not sums.isfinite().all())], self.device)
        if not bad[0]:
            return
        guilty = [
            (name, [i.image.name for i in term.images if not i.loss.isfinite()])
            for terms in found
            for name, term in terms.items()
            if not term.sum.isfinite()
        ]
        images = [name for _, names in guilty for name in names] or [
            name for batch in batches if batch.vae is not None for name in batch.vae.names
        ]
        own = (
            f"rank {rank()}: gradient norm {norm.item()}, non-finite terms "
            f"{sorted({name for name, _ in guilty}) or 'none'}, "
            f"images {', '.join(dict.fromkeys(images))}"
        )
        raise NonFiniteError(f"step {self.step}: " + " | ".join(all_gather(own)))

    def warn_if_untrained(self, terms: dict[str, LossTerm]) -> None:
        """A first cross-entropy near ln(vocabulary) is that of random weights."""
        if "ce" not in terms or self.args.training.init_from_scratch:
            return
        ce = terms["ce"].sum.item() / max(terms["ce"].count, 1.0)
        random_ce = math.log(self.model.config.llm.vocab_size)
        if ce > 0.9 * random_ce:
            print(
                f"WARNING: the first cross-entropy is {ce:.2f}; random weights give "
                f"{random_ce:.2f}. THE WEIGHTS LOOK UNTRAINED.",
                flush=True,
            )

    def save(self) -> Path:
        return save_checkpoint(self)

    def resume(self, folder: Path) -> None:
        """Continues exactly where the checkpoint stopped."""
        state = load_checkpoint(folder, self)
        self.step = state["step"]
        self.loader.load_state_dict(state["loader"])
        self.telemetry.steps_without |= state["steps_without"]
        # Stepping the old schedule before the optimizer would warn.
        lr_lambda = self.schedule.lr_lambdas[0]
        self.schedule = LambdaLR(self.optimizer, lr_lambda, last_epoch=self.step - 1)
