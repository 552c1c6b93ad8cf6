"""The training loop. One step fits on one screen and knows no loss and no model by name."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.loader import PackedLoader
from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import LossTerm
from modeling.batch import PackedBatch

from .arguments import RunArguments
from .backends import Backend
from .checkpoint import Saver, step_folders
from .distributed import HangWatch, StopRequest, rank, sum_over_ranks
from .ema import EMA
from .flops import batch_totals, peak_flops
from .freezing import FreezingCheck
from .guard import Guard
from .metrics import Metrics, read_lines
from .optim import lr_at
from .sinks import build_sinks
from .telemetry import Telemetry, warn_if_untrained
from .validation import Validation, best


class Stopped(Exception):
    """A signal has ended the run, which has saved its state."""


@dataclass
class Trainer:
    """Everything a run consists of; `fit` runs it to `total_steps`."""

    args: RunArguments
    source: Path
    """Folder that the model was loaded from; its tokenizer goes into every checkpoint."""
    start: str
    """Which of its weights, as `build.start` says."""
    backend: Backend
    loader: PackedLoader
    ema: EMA
    weights: dict[str, float]
    """Weight of every loss term."""
    telemetry: Telemetry
    guard: Guard
    validation: Validation | None = None
    step: int = 0
    saver: Saver = field(init=False)
    watch: HangWatch = field(init=False)

    def __post_init__(self) -> None:
        self.saver, self.watch = Saver(self), HangWatch(self.args.training.hang_timeout)

    @property
    def run(self) -> Path:
        return Path(self.args.training.checkpoint_dir)

    @property
    def model(self) -> Bagel:
        return self.backend.model

    def fit(self) -> None:
        """Raises Stopped after a signal, NonFiniteError and SaveError when going on is useless."""
        args, retry = self.args.training, 0
        if self.step >= args.total_steps and rank() == 0:
            print(f"nothing to do: step {self.step} of total_steps={args.total_steps}", flush=True)
        # Had they not been damaged, the run would have gone on from them.
        self.saver.passed_over = {f.name for f in step_folders(self.run) if int(f.name) > self.step}
        freezing = FreezingCheck(self.backend) if args.validate_freezing else None
        sinks = build_sinks(args, self.run, self.step)
        peak = peak_flops(self.backend.device, args.peak_tflops)
        path = self.run / "metrics.jsonl"
        with (
            StopRequest() as stop,
            self.watch,
            Metrics(path, self.step, args.total_steps, sinks, peak) as metrics,
        ):
            while self.step < args.total_steps:
                self.train_step(iter(self.loader), metrics)
                self.step += 1
                if freezing is not None:
                    freezing.after_step()
                self.watch.alive()
                last = self.step == args.total_steps
                stopped, failed = sum_over_ranks([float(stop.received), float(self.saver.failed)])
                if failed and not self.saver.finish():
                    retry = self.step + args.log_every
                if self.step % args.log_every == 0 or last or stopped:
                    self.log(metrics)
                if self.validation and (self.step % args.val_every == 0 or last):
                    with metrics.pause():
                        self.validation.run(self.step, self.ema, sinks)
                if self.step % args.save_every == 0 or last or stopped or self.step == retry:
                    with metrics.pause():
                        self.save(wait=bool(last or stopped or not args.async_save))
                self.watch.alive()
                if stopped and not last:
                    raise Stopped(f"a signal came; saved at step {self.step}")

    def log(self, metrics: Metrics) -> None:
        """One log line; the only place where the host waits for the device."""
        for name, value in self.guard.end_window().items():
            metrics.add(name, value)
        for name, count in self.loader.counts.items():
            metrics.add(f"samples/{name}", count)
        metrics.add("total_samples", sum(self.loader.counts.values()))
        metrics.add_sums({f"skipped/{name}": n for name, n in self.loader.skipped.items()})
        self.telemetry.end_window(metrics.log(self.step))

    def train_step(self, batches: Iterator[PackedBatch], metrics: Metrics) -> None:
        """Fetch, count, forward, weigh, backward, clip, judge, step, average."""
        args, backend = self.args.training, self.backend
        with metrics.wait():
            fetched = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        micro_batches = [batch.to(backend.device, non_blocking=True) for batch in fetched]
        counts = self.global_counts(micro_batches)
        # A count of 0 comes with a sum of exactly 0.
        scales = {name: self.weights[name] / (count or 1.0) for name, count in counts.items()}
        for name, count in counts.items():
            metrics.add(f"{name}_count", count)
        observe = self.telemetry.begin_step(counts, scales)
        # Whatever is random in the model is a function of the step.
        torch.manual_seed(hash((args.global_seed, self.step, rank())))
        found: list[dict[str, LossTerm]] = []
        for batch in micro_batches:
            terms = backend.forward(batch, scales=scales, observe=observe)
            loss = sum((scales.get(n, 0.0) * t.sum for n, t in terms.items()), torch.zeros(()))
            backend.backward(loss, last=batch is micro_batches[-1])
            for name, term in terms.items():
                metrics.add(name, term.sum, term.count)
                metrics.add(f"{name}_weighted", self.weights[name] * term.sum, term.count)
            metrics.add_totals(batch_totals(self.model.config, batch, args.freeze_vit))
            self.telemetry.add(self.step + 1, batch, terms)
            found.append(terms)
        norm = backend.clip(args.max_grad_norm)
        skip = self.guard.judge(self.step + 1, norm, micro_batches, found)
        self.telemetry.end_step(metrics, backend.device)
        metrics.add("total_norm", norm)
        metrics.add("lr", lr_at(self.step, args.lr, args))
        for group in backend.optimizer.param_groups:
            group["lr"] = lr_at(self.step, group["base_lr"], args)
            metrics.add(f"lr_{group['name']}", group["lr"])
        backend.update(skip)
        self.ema.update(skip)
        if self.step == 0 and not args.init_from_scratch:
            warn_if_untrained(found[0], self.model.config.llm.vocab_size)

    def global_counts(self, batches: list[PackedBatch]) -> dict[str, float]:
        """Counts over all micro-batches and ranks; what no batch has anything for is absent.

        Raises ValueError when that is every term.
        """
        shift = self.model.config.timestep_shift
        found = [self.model.losses.counts(batch, shift) for batch in batches]
        counts = [sum(c.get(name, 0.0) for c in found) for name in self.weights]
        holders = [float(sum(name in c for c in found)) for name in self.weights]
        totals = sum_over_ranks(counts + holders)
        present = {
            name: total
            for name, total, there in zip(
                self.weights, totals[: len(counts)], totals[len(counts) :], strict=True
            )
            if there
        }
        if not present:
            raise ValueError(
                f"step {self.step + 1}: nothing to train on: no sample of the batch has anything "
                f"for {', '.join(self.weights)}"
            )
        return present

    def save(self, wait: bool = True) -> None:
        """Saves a step folder, beside training unless it is to `wait`; then it tries until it has
        succeeded. Raises SaveError after too many failures."""
        self.saver.start()
        while wait and not self.saver.finish():
            self.saver.start()

    def best_steps(self, saved: Collection[int]) -> set[int]:
        """Of the saved steps the best by each of `best_metrics`."""
        names = self.validation.best_metrics if self.validation else ()
        history = read_lines(self.run / "validation.jsonl") if names else []
        return {*best(history, names, saved).values()}
