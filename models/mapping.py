"""The mapping T of stage 2 (IMLE): noise to latent code.

Shapes: B batch, E noise dimension, H hidden width, D latent dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.samplers import ImleKeys
from .activations import ACTIVATIONS
from .norm import SharedBatchNorm
from .sphere import Constraint, project


class NoiseToCode(nn.Module):
    """Base of the networks that map normal noise e [B, noise_dim] to codes z_BD; rows are independent in eval mode."""

    noise_dim: int

    def forward(self, e_BE: Tensor) -> Tensor:
        """Map normal noise to codes z_BD."""
        raise TypeError(f"{type(self).__name__} does not define forward")


class Standardised(NoiseToCode):
    """Base of the networks that work on codes less their mean, in units of their standard deviation (over all axes)."""

    centre: Tensor
    scale: Tensor

    def __init__(self, noise_dim: int, latent_dim: int, constraint: Constraint) -> None:
        super().__init__()
        self.noise_dim, self.latent_dim, self.constraint = noise_dim, latent_dim, constraint
        self.register_buffer("centre", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def standardise(self, mean_D: Tensor, root_DD: Tensor) -> None:
        """Take centre and scale from the mean and a root of the covariance of the codes."""
        self.centre.copy_(mean_D)
        self.scale.copy_((root_DD.square().sum() / self.latent_dim).sqrt().clamp(min=1e-12))

    def standard(self, z_BD: Tensor) -> Tensor:
        """Codes in the network's units."""
        return (z_BD - self.centre) / self.scale

    def codes_of(self, x_BD: Tensor) -> Tensor:
        """Codes z_BD of points in the network's units, projected."""
        return project(self.centre + self.scale * x_BD, self.constraint)


class Mapping(NoiseToCode):
    """T: e -> z. Published: two hidden layers, Linear without bias, BatchNorm and ReLU (Hoshen et al. 2019, Sec. 4.1).

    The published T is not normalised.  Its targets z_i lie on the unit sphere (or in the unit ball), so
    T(e) is projected here too (unless `constraint` is none): nothing is lost, and the norms of codes are those that G
    was trained on.

    In training, the published T normalises by the statistics of each batch.  A batch consists of matched noise,
    which is not distributed like noise, so T in training differs from T for candidates and samples.  After
    `fix_statistics` both are the same function: train it in eval mode.
    """

    def __init__(
        self,
        noise_dim: int,
        hidden_dim: int,
        latent_dim: int,
        constraint: Constraint = "sphere",
        depth: int = 2,
        activation: str = "relu",
        normalisation: str = "batch",
    ) -> None:
        super().__init__()
        self.constraint, self.depth, self.normalisation = constraint, depth, normalisation
        self.noise_dim, self.hidden_dim, self.latent_dim = noise_dim, hidden_dim, latent_dim
        self.activation = ACTIVATIONS[activation]
        for layer in range(1, depth + 1):
            inputs = noise_dim if layer == 1 else hidden_dim
            self.add_module(f"fc{layer}", nn.Linear(inputs, hidden_dim, bias=normalisation == "none"))
            if normalisation == "batch":
                self.add_module(f"norm{layer}", SharedBatchNorm(hidden_dim))
            elif normalisation == "layer":
                self.add_module(f"norm{layer}", nn.LayerNorm(hidden_dim))
        self.add_module(f"fc{depth + 1}", nn.Linear(hidden_dim, latent_dim, bias=False))

    def forward(self, e_BE: Tensor, weight_B: Tensor | None = None) -> Tensor:
        """Codes z_BD, projected; `weight_B` is 0 for padding, which BatchNorm ignores."""
        h_BH = e_BE
        for layer in range(1, self.depth + 1):
            h_BH = self.get_submodule(f"fc{layer}")(h_BH)
            if self.normalisation == "batch":
                h_BH = self.get_submodule(f"norm{layer}")(h_BH, weight_B)
            elif self.normalisation == "layer":
                h_BH = self.get_submodule(f"norm{layer}")(h_BH)
            h_BH = self.activation(h_BH)
        z_BD = self.get_submodule(f"fc{self.depth + 1}")(h_BH)
        return project(z_BD, self.constraint)

    @torch.no_grad()
    def fix_statistics(self, e_BE: Tensor) -> None:
        """Set the running statistics of every BatchNorm layer to those of this noise under the current weights."""
        self.eval()
        h_BH = e_BE
        for layer in range(1, self.depth + 1):
            h_BH = self.get_submodule(f"fc{layer}")(h_BH)
            norm = self.get_submodule(f"norm{layer}")
            norm.fix_statistics(h_BH)  # type: ignore[operator]
            h_BH = self.activation(norm(h_BH))


def build_mapping(config: ImleKeys, latent_dim: int, constraint: Constraint = "sphere") -> Mapping:
    """Build T: noise [B, config.noise_dim] -> codes [B, latent_dim].

    Args:
        constraint: that of the codes; `config.constraint` has priority.
    """
    return Mapping(
        config.noise_dim,
        config.hidden_dim,
        latent_dim,
        config.constraint or constraint,
        config.depth,
        config.activation,
        config.normalisation,
    )
