"""Velocity fields that carry noise (t = 0) to codes (t = 1).

Shapes: B batch, D latent dimension (and of the noise), F features of a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mapping import Standardised
from .mlp import Activation, mlp
from .sphere import Constraint

FREQUENCIES = 4  # of a time's features: half turns of 1 to 8


class VelocityFlow(Standardised):
    """z = x_1, where x_0 = e and x moves with u(x_t, t, s), the mean velocity of its path from t to s.

    With `mean` False, u(x_t, t, t) is all that was trained, and the path is followed by Heun's method, but for its last
    step: from there x_t + (1 - t) u(x_t, t, t) is the mean of the codes that x_t may lead to. At t = 1 itself, where
    Heun's method would look, u no longer depends on the noise, and draws would keep half of that step's noise.
    With `mean` True, x_s = x_t + (s - t) u(x_t, t, s), which is exact in any number of steps where u is.
    """

    def __init__(
        self,
        latent_dim: int,
        width: int,
        depth: int,
        activation: Activation,
        steps: int,
        mean: bool,
        constraint: Constraint,
    ) -> None:
        super().__init__(latent_dim, latent_dim, constraint)
        self.steps, self.mean = steps, mean
        self.body = mlp(latent_dim + 4 * FREQUENCIES + 2, width, depth, latent_dim, activation)

    def velocity(self, x_BD: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """u(x, t, s) [B, D]."""
        return self.body(torch.cat([x_BD, time_features(t_B), time_features(s_B - t_B)], dim=1))

    def forward(self, e_BE: Tensor) -> Tensor:
        x_BD, width = e_BE, 1 / self.steps
        for step in range(self.steps):
            t_B = torch.full_like(e_BE[:, 0], step * width)
            s_B = torch.full_like(t_B, (step + 1) * width)
            first_BD = self.velocity(x_BD, t_B, s_B if self.mean else t_B)
            if self.mean or step == self.steps - 1:
                x_BD = x_BD + width * first_BD
                continue
            second_BD = self.velocity(x_BD + width * first_BD, s_B, s_B)
            x_BD = x_BD + 0.5 * width * (first_BD + second_BD)
        return self.codes_of(x_BD)


def time_features(t_B: Tensor) -> Tensor:
    """A time or a duration in [0, 1] and its sines and cosines, [B, F]."""
    turn_F = math.pi * 2.0 ** torch.arange(FREQUENCIES, device=t_B.device)
    angle_BF = t_B[:, None] * turn_F
    return torch.cat([t_B[:, None], angle_BF.sin(), angle_BF.cos()], dim=1)
