"""A stage in this process: its steps, and the tensors of its networks."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from glann.trainers.stage import Stage, StageStep


def run(made: Stage, epoch: int = 0, step: int = 0, count: int | None = None) -> list[StageStep]:
    """Take the steps from a position on, all or the first `count`, with a piggyback of three numbers."""
    return list(islice(made.steps(epoch, step, lambda: torch.tensor([1.0, 0.0, 2.0])), count))


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a stage's `state`, by network, group and name."""
    return {
        f"{network} {group} {name}": tensor.clone()
        for network, groups in state.items()
        for group, held in groups.items()
        if isinstance(held, dict)
        for name, tensor in held.items()
    }
