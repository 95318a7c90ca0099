"""Construction of the configured reconstruction loss.

Shapes: B rows of a batch, C channels, H, W height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..config.paths import expand
from ..config.run import Config
from ..datasets.assets.catalogue import ASSETS, load_weights, weights_of
from ..errors import UserError
from ..models.losses import build_loss
from ..models.perceptual import build_features
from ..storage.files import NotRegular, open_regular, os_fault


def loss_weights(config: Config) -> str | None:
    """SHA-256 of the weights of the loss network; None without one.

    Raises:
        UserError: there is no such file.
    """
    name = weights_of(config.loss)
    if name is None:
        return None
    if name in ASSETS:
        return ASSETS[name].sha256  # what is fetched has no other
    try:
        with open_regular(expand(name)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotRegular) as error:
        raise UserError(f"no such weights: {name}; loss.weights is an asset or a file on all nodes") from error
    except OSError as error:
        raise os_fault(error, expand(name)) from error


def build_objective(config: Config, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Build the loss: (fake [B, C, H, W], real [B, C, H, W], patch seeds [B]) -> loss_B, float32.

    Downloads the weights of the perceptual network if they are not cached.

    Raises:
        UserError: weights, taps or levels that do not fit. EnvironmentFault: the weights cannot be downloaded.
    """
    features = None
    if (name := weights_of(config.loss)) is not None:
        features = build_features(config.loss.network, *load_weights(name))
    loss = build_loss(config.loss, config.data.resolution, features).to(device)
    if device.type == "cuda":
        loss = cast(Any, loss).to(memory_format=torch.channels_last)
    bf16 = config.engine.precision == "bf16"

    def objective(fake_BCHW: Tensor, real_BCHW: Tensor, seed_B: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return loss(fake_BCHW, real_BCHW, seed_B).float()

    return torch.compile(objective) if config.engine.compile else objective
