"""What processes share: ranks, collectives, signals, time-outs; the only file that reads the
environment."""

import faulthandler
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import STOP_SIGNALS

STOP_EXIT_CODE = 85
"""Of a run that a signal has stopped after it has saved: start it again."""
SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX
LINGER_SECONDS = 1.0
"""How far apart ranks are at most when they raise the same error."""


def launched_processes() -> int:
    """Processes that the launcher (torchrun, deepspeed, srun under torchrun) has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process among `launched_processes`, also before it has joined their group."""
    return int(os.environ.get("RANK", "0"))


def dead_variables() -> list[str]:
    """Of former trainers, those that are set."""
    return [name for name in ("TRAIN_STEP_BARRIER", "PIXEL_LOSS_USE_V0") if name in os.environ]


def processes_per_node(ranks: int) -> int:
    """As the launcher says; without one all ranks are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def local_device(kind: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device of this process. Raises ValueError without a GPU."""
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, timeout: float, wanted: bool = False) -> Iterator[None]:
    """Joins the launcher's process group, or, if `wanted`, makes one of this process alone.

    Host tensors travel by gloo, so that what the host must know does not wait for the device.
    `timeout` in seconds, 0 for torch's own.
    """
    if dist.is_initialized() or (launched_processes() == 1 and not wanted):
        yield
        return
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        timeout=timedelta(seconds=timeout) if timeout else None,
        **alone,
    )
    together = False
    try:
        yield
        # Without it a rank may close connections that another still reads from.
        dist.barrier()
        together = True
    finally:
        if not together:
            # The same for what all ranks raise; one that raises alone is not waited for.
            time.sleep(LINGER_SECONDS)
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(
    tensor: Tensor, op: dist.ReduceOp.RedOpType = SUM, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The sum (or `op`) over all ranks (of `group`), which all have to call it."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor, op, group)
    return tensor


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sums of host numbers in float64, without touching the device."""
    if not dist.is_initialized():
        return values
    return all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, which all have to call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_error(error: Exception | None) -> None:
    """Raises on all ranks what the first of them has met, so that none goes on alone."""
    for found in all_gather(error):
        if found is not None:
            raise found


def debugged_terms(names: list[str]) -> set[str]:
    """Loss terms whose `<NAME>_LOSS_DEBUG` is on (1, not empty or 0) on any rank."""
    own = {
        name for name in names if os.environ.get(f"{name.upper()}_LOSS_DEBUG", "0") not in ("", "0")
    }
    # A flag on one rank alone would send the others into other collectives.
    return set().union(*all_gather(own))


class StopRequest:
    """Remembers that one of STOP_SIGNALS came."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopRequest":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a parent may have blocked them
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class HangWatch:
    """Prints the stacks of all threads and exits with code 1 when `alive` is not called in time.

    Every rank watches itself: where one sleeps, the others wait for it and time out too.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds, 0 or inf for never; TRAIN_HANG_WATCHDOG_SECS wins over it."""
        stated = os.environ.get("TRAIN_HANG_WATCHDOG_SECS") or timeout
        try:
            self.timeout = float(stated)
        except ValueError as error:
            raise ValueError(f"TRAIN_HANG_WATCHDOG_SECS={stated!r} is no number") from error
        self.watching = False

    def __enter__(self) -> "HangWatch":
        self.watching = 0 < self.timeout < float("inf")
        self.alive()
        return self

    def __exit__(self, *exception: object) -> None:
        self.watching = False
        faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        if self.watching:
            faulthandler.dump_traceback_later(self.timeout, exit=True, file=sys.__stderr__ or 2)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other runs out of a folder. Raises ValueError on all ranks, with host and pid of the
    run that has it. The system drops the lock of a killed process."""
    file: IO[str] | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
            # Not flock: that lock would live on in workers of a killed process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            print(f"{socket.gethostname()} pid {os.getpid()}", file=file, flush=True)
        except OSError as found:
            error = found
            if file is not None and isinstance(found, BlockingIOError | PermissionError):
                file.seek(0)
                owner = file.read().strip()
                error = ValueError(f"{path.parent} is in use by another run: {owner}")
    try:
        first_error(error)
        yield
    finally:
        if file is not None:
            file.close()
