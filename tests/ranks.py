"""Runs a function on gloo ranks, as torchrun would."""

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(world_size: int, function: Callable[..., Any], folder: Path, *args: Any) -> list:
    """What `function(rank, *args)` returned on every rank; raises if it raised on any."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_one_rank, (world_size, function, folder, args), nprocs=world_size)
    return [pickle.loads((folder / f"rank{r}.pkl").read_bytes()) for r in range(world_size)]


def _one_rank(
    rank: int, world_size: int, function: Callable[..., Any], folder: Path, args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["DS_BUILD_OPS"] = "0"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    try:
        (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(function(rank, *args)))
        dist.barrier()
    finally:
        dist.destroy_process_group()
