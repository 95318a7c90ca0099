"""Construction of the engine selected by `engine.kind`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...config.sections import EngineConfig
from ...models.comm import world_size
from ...models.norm import SharedBatchNorm
from .deepspeed import DeepSpeedEngine
from .optimizer import OptimizerConfig
from .step import Engine


def build_engine(
    network: nn.Module,
    optimizer: OptimizerConfig,
    config: EngineConfig,
    batch: int,
    device: torch.device,
    state: Mapping | None = None,
) -> Engine:
    """The engine selected by `config.kind`; arguments as in `Engine`. A process may hold several, one per network.

    Raises:
        ValueError: the plain engine with several workers, as it does not average gradients; accumulation with
            BatchNorm, whose statistics would be those of micro-batches.
    """
    if config.accumulation > 1 and any(isinstance(layer, SharedBatchNorm) for layer in network.modules()):
        raise ValueError(f"engine.accumulation={config.accumulation} would change what a network with BatchNorm learns")
    if config.kind == "torch" and world_size() > 1:
        raise ValueError(f"engine.kind=torch trains on one worker, not {world_size()}; use engine.kind=deepspeed")
    kind = {"deepspeed": DeepSpeedEngine, "torch": Engine}[config.kind]
    return kind(network, optimizer, config, batch, device, state)
