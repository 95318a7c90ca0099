"""Encoders: an image to the distribution of its code, mirrored from the generator of the same kind.

Shapes: B batch, D latent dimension, O outputs, C channels, H = W the resolution in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ..config.networks import CriticConfig
from ..config.run import Config
from ..config.sections import GeneratorConfig
from .critics import build_critic

LEAST_DEVIATION = 1e-6


class Posterior(NamedTuple):
    """q(z | x): independent normal numbers with these means and deviations; a single point where there are none."""

    mean_BD: Tensor
    deviation_BD: Tensor | None

    @classmethod
    def of(cls, out_BO: Tensor, latent_dim: int) -> Posterior:
        """Read the output of an encoder. Deviations are softplus functions of it, as in Lucic et al. 2018."""
        mean_BD = out_BO[:, :latent_dim].float()
        if out_BO.shape[1] == latent_dim:
            return cls(mean_BD, None)
        return cls(mean_BD, F.softplus(out_BO[:, latent_dim:].float()) + LEAST_DEVIATION)

    def draw(self, e_BD: Tensor) -> Tensor:
        """Codes z_BD of normal noise."""
        return self.mean_BD if self.deviation_BD is None else self.mean_BD + self.deviation_BD * e_BD

    def divergence(self) -> Tensor:
        """KL(q(z | x) || N(0, I)) in nats, [B] (Kingma & Welling 2014, App. B); zero for single points."""
        if self.deviation_BD is None:
            return self.mean_BD.new_zeros(len(self.mean_BD))
        variance_BD = self.deviation_BD.square()
        return 0.5 * (self.mean_BD.square() + variance_BD - 1 - variance_BD.log()).sum(1)


class Encoder(nn.Module):
    """The layers of the critic of the generator's kind, which mirror it, and a linear layer to the code.

    As wide as the generator, and with BatchNorm where that has any; LeakyReLU(0.2).
    """

    def __init__(self, generator: GeneratorConfig, outputs: int, resolution: int, channels: int) -> None:
        super().__init__()
        self.latent_dim = generator.latent_dim
        mirror = CriticConfig(
            kind=generator.kind,
            width=generator.width,
            max_width=generator.max_width,
            batch_norm=generator.normalises,
        )
        self.trunk = build_critic(mirror, resolution, channels)
        self.code = nn.Linear(self.trunk.last.in_features, outputs)
        del self.trunk.last
        nn.init.normal_(self.code.weight, std=0.02)
        nn.init.zeros_(self.code.bias)

    def forward(self, img_BCHW: Tensor, weight_B: Tensor | None = None) -> Tensor:
        """Outputs [B, O], to be read by `Posterior.of`; `weight_B` is 0 for padding rows, which BatchNorm ignores."""
        code_BO: Tensor = self.code(self.trunk.features(img_BCHW, weight_B))
        return code_BO


def encoder_of(config: Config) -> Encoder:
    """Build the encoder of a run, with random weights; without `autoencoder.kl` it has no deviations.

    Raises:
        UserError: this kind of encoder cannot see images of that resolution.
    """
    outputs = (2 if config.autoencoder.kl else 1) * config.generator.latent_dim
    return Encoder(config.generator, outputs, config.data.resolution, config.data.channels)
