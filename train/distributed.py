"""What ranks share; the only file that reads the environment."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


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
    """Loss terms whose `<NAME>_LOSS_DEBUG` is 1, like SSIM_LOSS_DEBUG=1."""
    return {name for name in names if os.environ.get(f"{name.upper()}_LOSS_DEBUG") == "1"}
