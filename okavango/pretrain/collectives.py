"""The few collective operations that objectives need. Each does nothing in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over all processes; carries no gradient."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


@torch.no_grad()
def max_over_ranks(value: Tensor) -> Tensor:
    """The greatest over all processes, entry by entry; carries no gradient."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over all processes; carries no gradient."""
    return sum_over_ranks(value) / world_size()


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True on every process when `flag` is true on one."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)
