"""Numbers of a run: summed on the device, read once a log step, shown and written."""

import json
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .distributed import all_gather, rank, world_size
from .sinks import Sink, hand_on

FILE_ONLY = (
    *("tokens", "_weighted", "_count", "_images", "_share", "_clamped", "_grad_norm", "_grad_max"),
    *("model_flops", "samples", "_per_gpu", "step_s", "_model", "mot_und", "mot_gen", "_other"),
)
"""Endings of names that are written and not shown; nor are names of a group, `group/name`."""
SHOWN_IF_ANY = ("nonfinite_steps", "spikes")


def read_lines(path: Path, warns: bool = False) -> list[dict[str, Any]]:
    """Steps of a JSONL file, none without the file; what a kill or a full disk cut is left out."""
    content = path.read_bytes() if path.exists() else b""
    lines, torn = [], []
    for number, text in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError, OverflowError):
            torn.append(f"{path}:{number}")
    if torn and warns:
        print(f"WARNING: no JSON of a step, left out: {', '.join(torn)}", flush=True)
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """A resumed run writes those steps again. The file is there afterwards, with whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in read_lines(path, warns=True) if line["step"] <= step]
    whole = path.with_suffix(".part")
    whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
    whole.replace(path)


def append_line(path: Path, step: int, values: Mapping[str, float]) -> None:
    line = json.dumps({"step": step} | dict(values)) + "\n"
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")  # a full disk takes the first part of a line
        file.write(b"\n" * torn + line.encode())


@contextmanager
def optional(path: Path, step: int) -> Iterator[None]:
    """Around what writes of a step alone: on a full disk that is lost and told, the run is not."""
    try:
        yield
    except OSError as error:
        print(f"WARNING: step {step} is not in {path}: {error}", flush=True)


class Metrics:
    """Averages over the steps since the last log line; one JSONL line and one bar update each.

    A value given as (sum, count) is averaged over counts, so that a loss term which saw nothing is
    absent from the line rather than 0. Every rank counts, rank 0 writes.
    """

    def __init__(
        self,
        path: Path,
        first_step: int,
        total_steps: int,
        sinks: Sequence[Sink] = (),
        peak_flops: float | None = None,
    ) -> None:
        """`path` is the JSONL file; `peak_flops` of one device in FLOP/s turns `mfu` on."""
        self.path, self.total_steps = path, total_steps
        self.sinks, self.peak_flops, self.writes = sinks, peak_flops, rank() == 0
        self.first_step = self.last_step = first_step
        self.begin = time.perf_counter()
        if self.writes:
            drop_lines_after(path, first_step)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            disable=not (self.writes and Console().is_terminal),
        )
        self.task = self.progress.add_task("", completed=first_step, total=total_steps, shown="")
        self._reset()

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        hand_on(self.sinks, "close")

    def _reset(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, float] = {}
        self.largest: dict[str, Tensor] = {}
        self.totals: dict[str, float] = defaultdict(float)
        self.over_ranks: dict[str, float] = {}
        self.start = time.perf_counter()
        self.waited = 0.0
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def add(self, name: str, total: Tensor | float, count: float = 1.0) -> None:
        detached = total.detach() if isinstance(total, Tensor) else total
        self.sums[name] = self.sums.get(name, 0.0) + detached
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_largest(self, name: str, value: Tensor) -> None:
        """The line shows the largest value since the last one."""
        self.largest[name] = torch.maximum(self.largest.get(name, value), value).detach()

    def add_totals(self, totals: Mapping[str, float]) -> None:
        """The line shows them per step, added up over micro-batches and ranks.

        `tokens` and `model_flops` are what speed and utilisation are computed from.
        """
        for name, value in totals.items():
            self.totals[name] += value

    def add_sums(self, sums: Mapping[str, float]) -> None:
        """The line shows them as they are, added up over ranks, also if some have none."""
        self.over_ranks |= sums

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Around what waits for data; `data_wait_share` is its share of the time."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training, as validation: its time does not count."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def log(self, step: int) -> dict[str, float]:
        """Writes and returns the averages over all ranks, which all have to call it.

        The only place where the host waits for the device.
        """
        averages = {name: (float(total), self.counts[name]) for name, total in self.sums.items()}
        seconds = time.perf_counter() - self.start
        averages["data_wait_share"] = (self.waited, seconds)
        sums, counts, totals = (defaultdict[str, float](float) for _ in range(3))
        over_ranks: Counter[str] = Counter()
        ranks = all_gather((averages, dict(self.totals), self.over_ranks, _memory_gb()))
        for found, own_totals, own_sums, _ in ranks:
            over_ranks.update(own_sums)
            for name, (total, count) in found.items():
                sums[name] += total
                counts[name] += count
            for name, total in own_totals.items():
                totals[name] += total
        steps = max(1, step - self.last_step)
        line = {name: total / counts[name] for name, total in sums.items() if counts[name] > 0}
        if weighted := [line[name] for name in line if name.endswith("_weighted")]:
            line["loss_total"] = sum(weighted)
        line |= {name: total / steps for name, total in totals.items()} | over_ranks
        # Largest values are those of all ranks already.
        line |= {name: float(value) for name, value in self.largest.items()}
        line |= self._speed(totals["tokens"], totals["model_flops"], seconds, steps)
        line["memory_gb"] = max(memory for *_, memory in ranks)
        self.last_step = step
        self._write(step, line)
        self._reset()
        return line

    def _speed(self, tokens: float, flops: float, seconds: float, steps: int) -> dict[str, float]:
        speed = {"tokens_per_s": tokens / seconds, "step_s": seconds / steps}
        if torch.cuda.is_initialized():
            speed["tokens_per_s_per_gpu"] = speed["tokens_per_s"] / world_size()
        if self.peak_flops is not None and flops:
            speed["mfu"] = flops / seconds / (self.peak_flops * world_size())
        return speed

    def _write(self, step: int, line: Mapping[str, float]) -> None:
        if not self.writes:
            return
        with optional(self.path, step):
            append_line(self.path, step, line)
        hand_on(self.sinks, "scalars", step, {f"train/{name}": line[name] for name in line})
        names = [n for n in line if "/" not in n and not n.endswith(FILE_ONLY)]
        names = [n for n in names if line[n] or n not in SHOWN_IF_ANY]
        shown = "  ".join(f"{n} {line[n]:.3g}" for n in names)
        self.progress.update(self.task, completed=step, shown=shown)
        if self.progress.disable:
            per_step = (time.perf_counter() - self.begin) / max(1, step - self.first_step)
            left = timedelta(seconds=round(per_step * (self.total_steps - step)))
            print(f"step {step}/{self.total_steps}  {shown}  left {left}", flush=True)


def _memory_gb() -> float:
    """Most device memory in use since the last line; on a CPU, of the process since its start."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
