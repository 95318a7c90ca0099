"""A fixed distribution of codes, fitted to nothing: that of generators that are trained against a critic.

With the codes of GLO it is a baseline: how much worse are codes that know nothing of the images?

Shapes: B batch, D latent dimension (and of the noise).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ..config.samplers import PriorConfig, SamplerConfig
from ..models.mapping import NoiseToCode
from ..models.noise import uniform
from ..models.sphere import Constraint, project
from .base import Codes
from .closed_form import ClosedForm


class Prior(NoiseToCode):
    """z = e, 2 P(e) - 1 on each axis, or e / |e|."""

    def __init__(self, latent_dim: int, shape: str) -> None:
        super().__init__()
        self.noise_dim, self.shape = latent_dim, shape

    def forward(self, e_BD: Tensor) -> Tensor:
        if self.shape == "uniform":
            return (2 * uniform(e_BD) - 1).to(e_BD.dtype)
        return project(e_BD, "sphere") if self.shape == "sphere" else e_BD


class PriorSampler(ClosedForm):
    """Nothing to fit."""

    title = "Prior"

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> Prior:
        return Prior(latent_dim, cast(PriorConfig, config).shape)

    def solve(self, codes: Codes) -> float:
        return 0.0


SAMPLER = PriorSampler
