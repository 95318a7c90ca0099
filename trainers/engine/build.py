"""The engine that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...config.run import Config
from .deepspeed import DeepSpeedEngine
from .step import Engine


def build_engine(network: nn.Module, config: Config, device: torch.device, state: Mapping | None = None) -> Engine:
    """The engine that `config.engine.kind` names."""
    kind = {"deepspeed": DeepSpeedEngine, "torch": Engine}[config.engine.kind]
    return kind(network, config, device, state)
