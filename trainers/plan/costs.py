"""Costs per image of a step that trains the generator, measured on the networks without allocating them."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config.methods import has_critic_stage
from ...config.run import Config
from ...errors import UserError
from ...models.cost import Cost, cost, training_bytes
from ...models.critics import Critic, adversary_of, critic_of, label_maps
from ...models.encoders import encoder_of
from ...models.generators import Generator, generator_of
from ...models.losses import PerceptualLoss, build_loss
from ...models.perceptual import FeatureNet, SqueezeNet, Vgg16

CODES_OF_A_ROW = 2  # that G makes images of at once where a critic judges an autoencoder's (`trainers.adversary`)


class Compared(nn.Module):
    """A critic in the place of a reconstruction loss: (fake, real) -> one number per row, with both in the graph."""

    def __init__(self, critic: Critic, maps: int) -> None:
        """maps: channels for the label of an image."""
        super().__init__()
        self.critic, self.maps = critic, maps

    def forward(self, fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
        fake_B, real_B = (self.critic(F.pad(x, (0, 0, 0, 0, 0, self.maps))).score_B for x in (fake_BCHW, real_BCHW))
        return fake_B - real_B


def training_costs(config: Config) -> tuple[Cost, Cost]:
    """Costs per image of the generator and the loss, forward and backward, with what checkpointing recomputes.

    In place of the loss, a generator that is trained against a critic has the critic, on a real and a generated image.
    """
    generator, loss = build_networks(config, "meta")
    image = (config.data.channels, config.data.resolution, config.data.resolution)
    return cost(generator, (config.generator.latent_dim,)), cost(loss, image, image)


def encoder_cost(config: Config) -> Cost:
    """Cost per image of the encoder, forward and backward; nothing for a method without one."""
    if config.trainer != "autoencoder":
        return Cost(0, 0, 0, 0)
    with torch.device("meta"):
        encoder = encoder_of(config)
    return cost(encoder, (config.data.channels, config.data.resolution, config.data.resolution))


def step_bytes(config: Config, batch: int) -> int:
    """Bytes of activations and their gradients that a step of stage 1 holds at most, for a batch, in float32.

    An encoder has a step of its own, after that of the generator, and so has a critic.
    """
    generator, loss = build_networks(config, "meta")
    image = (config.data.channels, config.data.resolution, config.data.resolution)
    sizes = [training_bytes(Step(generator, loss), batch, (config.generator.latent_dim,), image)]
    if config.trainer != "autoencoder":
        return sizes[0]
    with torch.device("meta"):
        sizes.append(training_bytes(encoder_of(config), batch, image))
        if config.autoencoder.adversary.judges == "images":
            against = Step(generator, Compared(adversary_of(config), 0))
            sizes.append(training_bytes(against, CODES_OF_A_ROW * batch, (config.generator.latent_dim,), image))
        if has_critic_stage(config.method):
            against = Step(generator, Compared(critic_of(config), label_maps(config)))
            rows = math.ceil(batch * config.networks.batch_size / config.batch_size)
            sizes.append(training_bytes(against, rows, (config.generator.latent_dim,), image))
    return max(sizes)


def step_flops(config: Config) -> int:
    """Operations per image of a step that trains the generator, with what checkpointing recomputes.

    An encoder also runs once without a graph, for the codes that the generator's step starts from.
    """
    if not config.has_codes:
        return model_flops(config)
    (generator, loss), encoder = training_costs(config), encoder_cost(config)
    adversary = sum(adversary_flops(config)) if config.trainer == "autoencoder" else 0
    return generator.flops + loss.flops + encoder.flops + encoder.forward_flops + adversary


class Step(nn.Module):
    """Loss of the images of codes, as one module."""

    def __init__(self, generator: Generator, loss: nn.Module) -> None:
        super().__init__()
        self.generator, self.loss, self.patch = generator, loss, getattr(loss, "patch", None)

    def forward(self, z_BD: Tensor, real_BCHW: Tensor, **seeds: Tensor) -> Tensor:
        loss_B: Tensor = self.loss(self.generator(z_BD), real_BCHW, **seeds)
        return loss_B


def maps_values(config: Config) -> int:
    """Values of the feature maps of a real image, at all scales of the perceptual loss."""
    loss, side = cast(PerceptualLoss, build_networks(config, "meta")[1]), config.data.resolution
    return loss.real_maps(torch.empty(1, config.data.channels, side, side, device="meta")).shape[1]


def maps_dtype(config: Config) -> torch.dtype:
    """The precision that feature maps are computed in."""
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32


def cache_bytes(config: Config, rows: int) -> int:
    """Bytes that the feature maps of so many rows take on a worker; 0 if they are not kept."""
    return rows * maps_values(config) * maps_dtype(config).itemsize if config.loss.cache_features else 0


def require_cache_fits(config: Config, rows: int) -> None:
    """Raise UserError if the feature maps of a worker's rows need more than `loss.cache_features`."""
    needed = cache_bytes(config, rows)
    if needed > 1e9 * config.loss.cache_features:
        raise UserError(
            f"loss.cache_features={config.loss.cache_features:g} GB is too small: the feature maps of {rows:,} images "
            f"take {needed / 1e9:,.1f} GB of a worker; use more workers, allow that much, or set it to 0"
        )


def model_flops(config: Config) -> int:
    """Operations per image that the model itself needs, forward and backward.

    Utilisation (MFU) is measured by these: recomputed activations are work, but none that the model needs
    (Chowdhery et al. 2022, Appendix B).
    """
    engine = config.engine.model_copy(update={"activation_checkpointing": False})
    generator, loss = training_costs(config.model_copy(update={"engine": engine}))
    if not config.has_codes:
        return adversarial_flops(config)
    adversary = sum(adversary_flops(config)) if config.trainer == "autoencoder" else 0
    return generator.flops + loss.flops + encoder_cost(config).flops + adversary


def adversarial_flops(config: Config) -> int:
    """Operations per image of a generator and its critic: of the stage `networks`, from scratch or a refinement."""
    engine = config.engine.model_copy(update={"activation_checkpointing": False})
    bare, keys = config.model_copy(update={"engine": engine}), config.networks
    generator, critic = generator_cost(bare), critic_cost(config).flops // 2  # of one image
    slopes = {"none": 0, "r1-r2": 2}.get(keys.penalty.kind, 1)  # each is one more pass, differentiated twice
    judging = generator.forward_flops + (2 + 2 * slopes) * critic
    making = generator.flops + critic
    if config.has_codes:
        making += encoder_cost(config).flops + round(training_costs(bare)[1].flops / (1 + keys.generated))
    return judging + keys.generator_steps * making // keys.critic.steps


def adversary_flops(config: Config) -> tuple[int, int]:
    """Operations per image that a critic adds to an autoencoder: of its own step, and of those of G and the encoder."""
    judges = config.autoencoder.adversary.judges
    if judges == "none":
        return 0, 0
    generator, critic = generator_cost(config), adversary_cost(config).flops // 2  # of one image or code
    if judges == "codes":
        return 2 * critic, critic
    return generator.forward_flops + 2 * critic, generator.flops + 2 * critic


def generator_cost(config: Config) -> Cost:
    """Cost per image of the generator, forward and backward."""
    keys = config.generator.model_copy(update={"reference": 0})  # comes once with every batch, not with every image
    with torch.device("meta"):
        generator = generator_of(config.model_copy(update={"generator": keys}))
    return cost(generator, (config.generator.latent_dim,))


def critic_cost(config: Config) -> Cost:
    """Cost of the critic of a real and a generated image, forward and backward; nothing without that stage."""
    if not has_critic_stage(config.method):
        return Cost(0, 0, 0, 0)
    with torch.device("meta"):
        critic = Compared(critic_of(config), label_maps(config))
    image = (config.data.channels, config.data.resolution, config.data.resolution)
    return cost(critic, image, image)


def adversary_cost(config: Config) -> Cost:
    """Cost of the critic of an autoencoder, of two images or codes; nothing without one."""
    if config.trainer != "autoencoder" or config.autoencoder.adversary.judges == "none":
        return Cost(0, 0, 0, 0)
    with torch.device("meta"):
        critic = Compared(adversary_of(config), 0)
    shape: tuple[int, ...] = (config.data.channels, config.data.resolution, config.data.resolution)
    if config.autoencoder.adversary.judges == "codes":
        shape = (config.generator.latent_dim, 1, 1)
    return cost(critic, shape, shape)


def build_networks(config: Config, device: str) -> tuple[Generator, nn.Module]:
    """Generator and loss, or critic, as configured, with random weights, so that a plan needs no downloads."""
    keys = config.generator.model_copy(update={"reference": 0})  # comes once with every batch, not with every image
    with torch.device(device):
        generator = generator_of(config.model_copy(update={"generator": keys}))
        if not config.has_codes:
            return generator, Compared(critic_of(config), label_maps(config))
        features: FeatureNet | None = None
        if config.loss.kind == "perceptual":
            network = Vgg16 if config.loss.network == "vgg16" else SqueezeNet
            features = network("caffe").requires_grad_(False)
        return generator, build_loss(config.loss, config.data.resolution, features)
