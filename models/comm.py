"""Where this process stands among the workers, and sums over them; one process alone where there is no group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_sum(tensor: Tensor) -> Tensor:
    """The tensor summed over all processes, in place; all of them have to call it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
