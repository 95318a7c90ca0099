"""Construction of the engine that `engine.kind` names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...config.sections import EngineConfig
from ...models.comm import world_size
from .deepspeed import DeepSpeedEngine
from .step import Engine, OptimizerConfig


def build_engine(
    network: nn.Module,
    optimizer: OptimizerConfig,
    config: EngineConfig,
    batch: int,
    device: torch.device,
    state: Mapping | None = None,
) -> Engine:
    """The engine that `config.kind` names; arguments as of `Engine`. A process may hold several, one per network.

    Raises:
        ValueError: the plain engine in a group of several workers, whose gradients it would not average.
    """
    if config.kind == "torch" and world_size() > 1:
        raise ValueError(f"engine.kind=torch trains on one worker, not {world_size()}; use engine.kind=deepspeed")
    kind = {"deepspeed": DeepSpeedEngine, "torch": Engine}[config.kind]
    return kind(network, optimizer, config, batch, device, state)
