"""The training loop. One step fits on one screen and knows no loss and no model by name."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from data.loader import PackedLoader
from modeling.bagel.bagel import Bagel
from modeling.batch import PackedBatch

from .arguments import RunArguments
from .checkpoint import load_checkpoint, save_checkpoint
from .ema import EMA
from .metrics import Metrics


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
                    metrics.log(self.step)
                if self.step % args.save_every == 0 or last:
                    self.save()

    def train_step(self, batches: Iterator[PackedBatch], metrics: Metrics) -> None:
        """Fetch, forward, weigh, backward, clip, step, average."""
        batch = next(batches).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.training.bf16):
            terms = self.model(batch)
        loss = torch.zeros((), device=self.device)
        for name, term in terms.items():
            # A count of 0 comes with a sum of exactly 0.
            weighted = self.weights[name] * term.sum
            loss = loss + weighted / (term.count or 1.0)
            metrics.add(name, term.sum, term.count)
            metrics.add(f"{name}_weighted", weighted, term.count)
        if not terms:
            raise ValueError(
                f"step {self.step}: nothing to train on: no sample of the batch has anything for "
                f"{', '.join(self.weights)}"
            )
        self.optimizer.zero_grad()
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.args.training.max_grad_norm)
        self.require_finite(norm, {n: term.sum for n, term in terms.items()}, batch)
        metrics.add("lr", self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.ema.update()
        metrics.add("total_norm", norm)
        metrics.add("tokens", batch.num_tokens)
        if self.step == 0:
            self.warn_if_untrained(terms)

    def require_finite(self, norm: Tensor, sums: dict[str, Tensor], batch: PackedBatch) -> None:
        """Raises NonFiniteError, before any weight has moved, naming the terms and the images."""
        finite = torch.isfinite(torch.stack([norm, *sums.values()]))
        if finite.all():
            return
        guilty = [name for name, ok in zip(sums, finite[1:].tolist(), strict=True) if not ok]
        names = batch.vae.names if batch.vae is not None else ()
        raise NonFiniteError(
            f"step {self.step}: gradient norm {norm.item()}, non-finite terms {guilty or 'none'}; "
            f"images of the batch: {', '.join(dict.fromkeys(names))}"
        )

    def warn_if_untrained(self, terms: dict[str, Any]) -> None:
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
        state = {"loader": self.loader.state_dict()}
        return save_checkpoint(
            self.run,
            self.step,
            self.model,
            self.ema,
            self.optimizer,
            state,
            self.loader.resize_rules,
            self.args,
        )

    def resume(self, folder: Path) -> None:
        """Continues exactly where the checkpoint stopped."""
        state = load_checkpoint(folder, self.model, self.ema, self.optimizer)
        self.step = state["step"]
        self.loader.load_state_dict(state["loader"])
        # Stepping the old schedule before the optimizer would warn.
        lr_lambda = self.schedule.lr_lambdas[0]
        self.schedule = LambdaLR(self.optimizer, lr_lambda, last_epoch=self.step - 1)
