"""Numbers of a run: summed on the device, read once a log step, shown and written."""

import json
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .distributed import all_gather

FILE_ONLY = ("tokens", "_weighted", "_count", "_images", "_clamped", "_grad_norm", "_grad_max")
"""Endings of names that are written to the file and not shown."""


class Metrics:
    """Averages over the steps since the last log line; one JSONL line and one bar update each.

    A value given as (sum, count) is averaged over counts, so that a loss term which saw nothing is
    absent from the line rather than 0.
    """

    def __init__(self, path: Path, first_step: int, total_steps: int) -> None:
        self.path, self.first_step, self.total_steps = path, first_step, total_steps
        self.begin = time.perf_counter()
        self._drop_lines_after(first_step)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            disable=not Console().is_terminal,
        )
        self.task = self.progress.add_task("", completed=first_step, total=total_steps, shown="")
        self._reset()

    def _drop_lines_after(self, step: int) -> None:
        """A resumed run writes those steps again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in kept))

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, float] = {}
        self.largest: dict[str, Tensor] = {}
        self.start = time.perf_counter()

    def add(self, name: str, total: Tensor | float, count: float = 1.0) -> None:
        detached = total.detach() if isinstance(total, Tensor) else total
        self.sums[name] = self.sums.get(name, 0.0) + detached
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_largest(self, name: str, value: Tensor) -> None:
        """The line shows the largest value since the last one."""
        self.largest[name] = torch.maximum(self.largest.get(name, value), value).detach()

    def log(self, step: int) -> dict[str, float]:
        """Writes and returns the averages over all ranks, which all have to call it.

        The only place where the host waits for the device.
        """
        seconds = time.perf_counter() - self.start
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        own = {name: (float(total), self.counts[name]) for name, total in self.sums.items()}
        for found in all_gather(own):
            for name, (total, count) in found.items():
                sums[name] += total
                counts[name] += count
        line = {name: total / counts[name] for name, total in sums.items() if counts[name] > 0}
        # Largest values are those of all ranks already.
        line |= {name: float(value) for name, value in self.largest.items()}
        line["tokens_per_s"] = sums["tokens"] / seconds
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | line) + "\n")
        shown = "  ".join(f"{n} {v:.3g}" for n, v in line.items() if not n.endswith(FILE_ONLY))
        self.progress.update(self.task, completed=step, shown=shown)
        if self.progress.disable:
            per_step = (time.perf_counter() - self.begin) / (step - self.first_step)
            left = timedelta(seconds=round(per_step * (self.total_steps - step)))
            print(f"step {step}/{self.total_steps}  {shown}  left {left}", flush=True)
        self._reset()
        return line
