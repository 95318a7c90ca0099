"""Rank, world size and collectives; without a process group, those of a single process."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

# One tensor for all ranks, not a list of one each. Torch 2.13 has given the function a new name.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of processes, in all or in the group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """The rank of this process, from 0."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def all_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over all processes, in place; a collective call."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def broadcast(tensor: Tensor, owner: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """Broadcast the tensor of rank `owner` of the group, in place; a collective call."""
    if world_size(group) > 1:
        dist.broadcast(tensor, owner if group is None else dist.get_global_rank(group, owner), group=group)
    return tensor


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather the tensors of all processes to [W, ...], in the order of ranks; a collective call."""
    world = world_size(group)
    if world == 1:
        return tensor[None]
    gathered = tensor.new_empty(world, *tensor.shape)
    _GATHER(gathered.view(-1), tensor.reshape(-1), group)
    return gathered
