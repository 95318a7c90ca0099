"""Construction of the configured reconstruction loss.

Shapes: B rows of a batch, C channels, H, W height and width, V values of the feature maps of an image.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor

from ..config.paths import expand
from ..config.run import Config
from ..datasets.assets.catalogue import ASSETS, load_weights, weights_of
from ..errors import UserError
from ..models.losses import PerceptualLoss, build_loss
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


class Objective:
    """The loss: (fake [B, C, H, W], real [B, C, H, W], patch seeds [B]) -> loss_B, float32.

    Downloads the weights of the perceptual network if they are not cached.

    Raises:
        UserError: weights, taps or levels that do not fit. EnvironmentFault: the weights cannot be downloaded.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        features = None
        if (name := weights_of(config.loss)) is not None:
            features = build_features(config.loss.network, *load_weights(name))
        self.loss = build_loss(config.loss, config.data.resolution, features).to(device)
        if device.type == "cuda":
            self.loss = cast(Any, self.loss).to(memory_format=torch.channels_last)
        self.device, self.bf16 = device, config.engine.precision == "bf16"
        self.compute = torch.compile(self._compute) if config.engine.compile else self._compute

    def __call__(
        self, fake_BCHW: Tensor, real_BCHW: Tensor, seed_B: Tensor, real_maps_BV: Tensor | None = None
    ) -> Tensor:
        """real_maps_BV: `real_maps` of the real images, if they are known."""
        more = () if real_maps_BV is None else (real_maps_BV,)  # a perceptual loss takes them
        return self.compute(fake_BCHW, real_BCHW, seed_B, *more)

    def real_maps(self, real_BCHW: Tensor) -> Tensor:
        """Feature maps of real images, [B, V], of a perceptual loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return cast(PerceptualLoss, self.loss).real_maps(real_BCHW)

    def _compute(self, *given: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss(*given).float()
