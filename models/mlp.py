"""Plain fully connected networks, and the map that is one of them.

Shapes: B batch, I inputs, O outputs, E noise dimension, D latent dimension.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from .mapping import Standardised
from .sphere import Constraint


def mlp(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """`depth` hidden layers of `width` with SiLU: [B, I] -> [B, O]."""
    sizes = [inputs, *[width] * depth]
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class OneStep(Standardised):
    """z = f(e) by one pass through such a network."""

    def __init__(self, noise_dim: int, latent_dim: int, width: int, depth: int, constraint: Constraint) -> None:
        super().__init__(noise_dim, latent_dim, constraint)
        self.body = mlp(noise_dim, width, depth, latent_dim)

    def forward(self, e_BE: Tensor) -> Tensor:
        return self.codes_of(self.body(e_BE))
