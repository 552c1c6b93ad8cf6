"""What ranks share; the only file that reads the environment."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def require_single_process() -> None:
    """Raises ValueError under a launcher of several processes: they would train side by side,
    each for itself, in one folder."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"WORLD_SIZE={processes}: training runs in a single process so far")


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or `op`) over all ranks; every rank has to call it."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor, op)
    return tensor


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sums of host numbers in float64, without touching the device in a single process."""
    if not dist.is_initialized():
        return values
    return all_reduce(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks; every rank has to call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def debugged_terms(names: list[str]) -> set[str]:
    """Loss terms whose `<NAME>_LOSS_DEBUG` is on (1, not empty or 0) on any rank."""
    own = {
        name for name in names if os.environ.get(f"{name.upper()}_LOSS_DEBUG", "0") not in ("", "0")
    }
    # A flag on one rank alone would send the others into other collectives.
    return set().union(*all_gather(own))
