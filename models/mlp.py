"""Plain fully connected networks, and the map that is one of them.

Shapes: B batch, I inputs, O outputs, E noise dimension, D latent dimension.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from .mapping import Standardised
from .sphere import Constraint

Activation = Literal["silu", "relu"]
LAYERS: dict[Activation, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}


def mlp(inputs: int, width: int, depth: int, outputs: int, activation: Activation = "silu") -> nn.Sequential:
    """`depth` hidden layers of `width`: [B, I] -> [B, O]."""
    sizes = [inputs, *[width] * depth]
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), LAYERS[activation]())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class OneStep(Standardised):
    """z = f(e) by one pass through such a network."""

    def __init__(
        self, noise_dim: int, latent_dim: int, width: int, depth: int, activation: Activation, constraint: Constraint
    ) -> None:
        super().__init__(noise_dim, latent_dim, constraint)
        self.body = mlp(noise_dim, width, depth, latent_dim, activation)

    def forward(self, e_BE: Tensor) -> Tensor:
        return self.codes_of(self.body(e_BE))
