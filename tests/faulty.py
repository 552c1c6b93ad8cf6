"""Whole runs of the entry point in forked processes, and the faults that are put into them.

A fault is a function that runs in the process before the run does and changes what it finds there.
"""

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from data.loader import PackedLoader
from data.packer import Sample, TextSegment
from modeling import pretrained
from modeling.batch import PackedBatch
from tests.helpers import pack, restoration, run_arguments, tiny_config
from train import checkpoint
from train.distributed import rank, world_size
from train.main_sr_pixel_loss import main
from train.trainer import Trainer

Fault = Callable[[], object]

# Torch is imported once, in the server that all runs are forked from.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])
PATIENCE = 120.0
"""Seconds after which a run counts as hanging."""
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "half written"}
"""Audit events of changed files; also of reading, the first."""


@dataclass
class Run:
    """The processes of one run, a process per rank."""

    logs: list[Path]
    processes: list[BaseProcess]

    def codes(self) -> list[int]:
        """Exit codes, -9 after SIGKILL. Ends what hangs."""
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"hung: {self.texts()}"
        return [process.exitcode for process in self.processes]

    def texts(self) -> list[str]:
        """What each rank has printed, on both streams."""
        return [log.read_text() for log in self.logs]


def start(
    common: tuple[Path, Path],
    folder: Path,
    *faults: Fault,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    log: str | None = None,
    **changes: Any,
) -> Run:
    """Begins a run; `common` are checkpoint and mixture, `changes` arguments of the run.

    What rank r prints goes to `<log>.<r>.txt` beside the run folder.
    """
    launched = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    logs = [folder.with_name(f"{log or folder.name}.{r}.txt") for r in range(ranks)]
    processes: list[BaseProcess] = []
    for r in range(ranks):
        told = launched | {"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}
        values = words(common, folder, **changes), logs[r], told | dict(environment or {}), faults
        processes.append(FORKS.Process(target=_process, args=values))
        processes[-1].start()
    return Run(logs, processes)


def ended(*args: Any, **options: Any) -> tuple[list[int], list[str]]:
    """A run to its end: exit codes and texts of its ranks."""
    run = start(*args, **options)
    return run.codes(), run.texts()


def words(common: tuple[Path, Path], folder: Path, **changes: Any) -> list[str]:
    """A command line of the entry point."""
    quick = {"num_workers": 0, "enable_tensorboard": False}
    args = run_arguments(*common, folder, **(quick | changes))
    return [f"--{name}={args.flat()[name]}" for name in args.sources if name in args.flat()]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _process(
    argv: list[str], log: Path, environment: dict[str, str], faults: tuple[Fault, ...]
) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(environment)
    torch.set_num_threads(1)
    for fault in faults:
        fault()
    main(argv)


# Faults. Arguments that say where: a step counts from 0, as in the trainer.


def before_steps(action: Callable[[Trainer], object]) -> None:
    """Calls `action` with the trainer before every step."""
    step = Trainer.train_step

    def changed(self: Trainer, *args: Any) -> None:
        action(self)
        step(self, *args)

    Trainer.train_step = changed  # type: ignore[method-assign]


def at(step: int, action: Fault, on_rank: int | None = None) -> None:
    """Does something before one step, on one rank or on all."""
    before_steps(lambda trainer: trainer.step == step and on_rank in (None, rank()) and action())


def signalled(number: int) -> None:
    os.kill(os.getpid(), number)


def slow_batches(seconds: float) -> None:
    """Each takes so much longer to arrive."""
    take = PackedLoader.next_batch

    def slow(self: PackedLoader) -> PackedBatch:
        time.sleep(seconds)
        return take(self)

    PackedLoader.next_batch = slow  # type: ignore[method-assign]


def kills_children(name: str) -> None:
    """SIGKILL of the processes with `name` in their command that this one has started."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            if name in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(int(child), signal.SIGKILL)


def leaves_a_child_and_sleeps(told: Path) -> None:
    """Forks a child that inherits all open files, and writes its process id."""
    if child := os.fork():
        told.with_suffix(".tmp").write_text(str(child))
        told.with_suffix(".tmp").rename(told)
    time.sleep(PATIENCE)
    os._exit(1)


def killed_after(seconds: float) -> None:
    """SIGKILL that long after the beginning of the first step."""
    timer = threading.Timer(seconds, signalled, [signal.SIGKILL])
    timer.daemon = True
    before_steps(lambda _: timer.is_alive() or timer.ident or timer.start())


def killed_in_save(step: int, stage: int, told: Path | None = None) -> None:
    """SIGKILL before a stage of the save of `step`; `told` gets all of them.

    A stage is a change of a file that is of another kind than the change before.
    """
    for module in (checkpoint, pretrained):
        module.save_file = partial(_in_two_halves, module.save_file)
    stages: list[str] = []

    def hook(event: str, args: tuple) -> None:
        writing = event != "open" or (set(str(args[1])) & set("wxa") and ".saving-" in str(args[0]))
        if event not in CHANGES or not writing or (stages and stages[-1] == "over"):
            return
        path = Path(args[0])
        name = event if event == "os.remove" else f"{event} {path.suffix or path.name}"
        if not stages and name != f"os.mkdir .saving-{step:07d}" or name in stages[-1:]:
            return
        stages.append("over" if stages and event == "os.mkdir" else name)
        if len(stages) == stage:
            signalled(signal.SIGKILL)
        if told is not None:
            told.write_text("\n".join(stages))

    sys.addaudithook(hook)


def _in_two_halves(write: Callable[..., None], tensors: Any, path: Path, *more: Any) -> None:
    """Writes a file whose first half is there alone for a moment."""
    write(tensors, path, *more)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    sys.audit("half written", str(path))
    path.write_bytes(content)


def failing_writes(error: Exception, on_rank: int) -> None:
    """Every weight file of one rank raises."""
    write = checkpoint.save_file

    def failing(*args: Any) -> None:
        if rank() == on_rank:
            raise error
        write(*args)

    checkpoint.save_file = failing  # type: ignore[assignment]


def killed_in_write(step: int, on_rank: int) -> None:
    """SIGKILL of one rank before its first weight file of a step folder."""
    write = checkpoint.save_file

    def killing(tensors: Any, path: Path, *more: Any) -> None:
        if rank() == on_rank and path.parent.name.endswith(f"{step:07d}"):
            signalled(signal.SIGKILL)
        write(tensors, path, *more)

    checkpoint.save_file = killing  # type: ignore[assignment]


def full_disk(first: int, last: int) -> None:
    """No file grows beyond half the size of a weight file, from one step to another."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(trainer: Trainer) -> None:
        size = 200_000 if first <= trainer.step < last else most
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

    before_steps(limit)


def spoiled_steps(steps: set[int], on_rank: int) -> None:
    """A pixel of the last image is NaN in these steps of one rank."""
    step = Trainer.train_step

    def changed(self: Trainer, batches: Iterator[PackedBatch], *args: Any) -> None:
        if self.step in steps and rank() == on_rank:
            batches = iter([with_nan(next(batches))])
        step(self, batches, *args)

    Trainer.train_step = changed  # type: ignore[method-assign]


def with_nan(batch: PackedBatch) -> PackedBatch:
    assert batch.vae is not None
    last = batch.vae.images[-1].clone()
    last[0, 0, 0] = torch.nan
    vae = dataclasses.replace(batch.vae, images=(*batch.vae.images[:-1], last))
    return dataclasses.replace(batch, vae=vae)


def told_samples(folder: Path) -> None:
    """Appends number and samples of every step to a file of this rank in `folder`."""
    count = Trainer.global_counts

    def changed(self: Trainer, batches: list[PackedBatch]) -> dict[str, float]:
        names = [name for b in batches if b.vae for name in dict.fromkeys(b.vae.names)]
        with (folder / f"samples.{rank()}").open("a") as file:
            file.write(json.dumps([self.step, names]) + "\n")
        return count(self, batches)

    Trainer.global_counts = changed  # type: ignore[method-assign]


def samples(folder: Path) -> dict[int, set[tuple[str, ...]]]:
    """What `told_samples` has written: everything that was ever drawn for each step."""
    found: dict[int, set[tuple[str, ...]]] = {}
    for path in folder.glob("samples.*"):
        for step, names in map(json.loads, path.read_text().splitlines()):
            found.setdefault(step, set()).add(tuple(names))
    return found


def packs_by_number(kinds: tuple[str, ...], dtype: torch.dtype = torch.float32) -> None:
    """The same stream of packs on any number of ranks: rank r takes the packs m * W + r.

    Pack p has the samples of kinds[p % len(kinds)], a letter each: `t` is text alone, a capital
    has no answer.
    """

    def sample(letter: str, number: int) -> Sample:
        if letter == "t":
            return Sample("t", [TextSegment(ids=[1, 2]), TextSegment(ids=[5, 6, 7], answer=True)])
        answer = None if letter.isupper() else (4, 5)
        return restoration(f"{letter}{number}", answer=answer)

    def build(number: int) -> PackedBatch:
        chosen = [sample(letter, number) for letter in kinds[number % len(kinds)]]
        batch = pack(tiny_config(), *chosen)
        return batch.map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def packs(self: PackedLoader) -> Iterator[PackedBatch]:
        while True:
            self.number = getattr(self, "number", 0) + world_size()
            yield build(self.number - world_size() + rank())

    def load(self: PackedLoader, state: dict[str, int]) -> None:
        self.number = state["packs"]

    changes = {
        "__iter__": packs,
        "state_dict": lambda self: {"packs": self.number, "damaged": []},
        "load_state_dict": load,
    }
    for name, change in changes.items():
        setattr(PackedLoader, name, change)
