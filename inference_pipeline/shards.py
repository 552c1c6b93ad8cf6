"""The processes of a `torchrun` that share one test set."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others' samples: shares of a test set end at different times."""


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Index of this process's GPU on its machine."""

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def first_says(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first process; its errors are raised on all of them."""
        if self.count == 1:
            return function()
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = function()
            except (ValueError, OSError) as error:
                said[1] = error
        dist.broadcast_object_list(said)
        if said[1] is not None:
            raise said[1]
        return said[0]


ALONE = Processes()


def join() -> Processes:
    """This process among those of its `torchrun`; alone without one."""
    if not dist.is_torchelastic_launched():
        return ALONE
    dist.init_process_group("gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank())


def leave(processes: Processes) -> None:
    if processes.count > 1:
        dist.barrier()
        dist.destroy_process_group()
