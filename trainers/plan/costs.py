"""Costs per image of a step of stage 1, measured on the networks without allocating them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...config.run import Config
from ...models.cost import Cost, cost, training_bytes
from ...models.generators import Generator, generator_of
from ...models.losses import ReconstructionLoss, build_loss
from ...models.perceptual import FeatureNet, SqueezeNet, Vgg16


def training_costs(config: Config) -> tuple[Cost, Cost]:
    """Costs per image of the generator and the loss, forward and backward, with what checkpointing recomputes."""
    generator, loss = build_networks(config, "meta")
    image = (config.data.channels, config.data.resolution, config.data.resolution)
    return cost(generator, (config.generator.latent_dim,)), cost(loss, image, image)


def step_bytes(config: Config, batch: int) -> int:
    """Bytes of activations and their gradients that a step of stage 1 holds at most, for a batch, in float32."""
    step = Step(*build_networks(config, "meta"))
    image = (config.data.channels, config.data.resolution, config.data.resolution)
    return training_bytes(step, batch, (config.generator.latent_dim,), image)


class Step(nn.Module):
    """Loss of the images of codes, as one module."""

    def __init__(self, generator: Generator, loss: ReconstructionLoss) -> None:
        super().__init__()
        self.generator, self.loss, self.patch = generator, loss, loss.patch

    def forward(self, z_BD: Tensor, real_BCHW: Tensor, **seeds: Tensor) -> Tensor:
        loss_B: Tensor = self.loss(self.generator(z_BD), real_BCHW, **seeds)
        return loss_B


def model_flops(config: Config) -> int:
    """Operations per image that the model itself needs, forward and backward.

    Utilisation (MFU) is measured by these: recomputed activations are work, but none that the model needs
    (Chowdhery et al. 2022, Appendix B).
    """
    engine = config.engine.model_copy(update={"activation_checkpointing": False})
    return sum(part.flops for part in training_costs(config.model_copy(update={"engine": engine})))


def build_networks(config: Config, device: str) -> tuple[Generator, ReconstructionLoss]:
    """Generator and loss as configured, with random weights, so that a plan needs no downloads."""
    with torch.device(device):
        generator = generator_of(config)
        features: FeatureNet | None = None
        if config.loss.kind == "perceptual":
            network = Vgg16 if config.loss.network == "vgg16" else SqueezeNet
            features = network("caffe").requires_grad_(False)
        loss = build_loss(config.loss, config.data.resolution, features)
    return generator, loss
