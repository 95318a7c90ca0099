"""A fixed distribution of codes, fitted to nothing: that of generators that are trained against a critic.

With the codes of GLO it is a baseline: how much worse are codes that know nothing of the images?

Shapes: B batch, D latent dimension (and of the noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from torch import Tensor

from ..config.samplers import PriorConfig, SamplerConfig
from ..models.comm import all_sum
from ..models.mapping import NoiseToCode
from ..models.noise import uniform
from ..models.sphere import Constraint, project
from .base import Codes, FitStep, Sampler


class Prior(NoiseToCode):
    """z = e, 2 P(e) - 1 on each axis, or e / |e|."""

    def __init__(self, latent_dim: int, shape: str) -> None:
        super().__init__()
        self.noise_dim, self.shape = latent_dim, shape

    def forward(self, e_BD: Tensor) -> Tensor:
        if self.shape == "uniform":
            return (2 * uniform(e_BD) - 1).to(e_BD.dtype)
        return project(e_BD, "sphere") if self.shape == "sphere" else e_BD


class PriorSampler(Sampler):
    """Nothing to fit: one epoch of one step."""

    title = "Prior"

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> Prior:
        return Prior(latent_dim, cast(PriorConfig, config).shape)

    def fit(
        self,
        codes: Codes,
        first_epoch: int,
        piggyback: Callable[[], Tensor],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Iterator[FitStep]:
        if first_epoch >= self.epochs:
            return
        enter("prior")
        yield FitStep(0, 0, 1, all_sum(piggyback().to(self.device)).cpu(), True, {"loss": 0.0})


SAMPLER = PriorSampler
