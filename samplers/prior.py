"""A fixed distribution of codes, fitted to nothing: that of generators that are trained against a critic.

With the codes of GLO it is a baseline: how much worse are codes that know nothing of the images?

Shapes: B batch, E noise dimension, F numbers of a code that say no category, K categories.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..config.samplers import PriorConfig, SamplerConfig
from ..models.labels import one_hot
from ..models.mapping import NoiseToCode
from ..models.noise import uniform
from ..models.sphere import Constraint, project
from .base import Codes
from .closed_form import ClosedForm


class Prior(NoiseToCode):
    """z = e, 2 P(e) - 1 on each axis, or e / |e|; with categories, followed by one of K unit vectors.

    The last number of the noise chooses among them, all alike: category k has its quantiles from k / K to (k + 1) / K.
    """

    def __init__(self, latent_dim: int, shape: str, categories: int = 0) -> None:
        super().__init__()
        self.free, self.shape, self.categories = latent_dim - categories, shape, categories
        self.noise_dim = self.free + bool(categories)

    def forward(self, e_BE: Tensor) -> Tensor:
        e_BF = e_BE[:, : self.free]
        if self.shape == "uniform":
            z_BF = (2 * uniform(e_BF) - 1).to(e_BE.dtype)
        else:
            z_BF = project(e_BF, "sphere") if self.shape == "sphere" else e_BF
        if not self.categories:
            return z_BF
        category_B = (uniform(e_BE[:, -1]) * self.categories).long().clamp(max=self.categories - 1)
        return torch.cat([z_BF, one_hot(category_B, self.categories).to(z_BF.dtype)], 1)


class PriorSampler(ClosedForm):
    """Nothing to fit."""

    title = "Prior"

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> Prior:
        keys = cast(PriorConfig, config)
        return Prior(latent_dim, keys.shape, keys.categories)

    def solve(self, codes: Codes) -> float:
        return 0.0


SAMPLER = PriorSampler
