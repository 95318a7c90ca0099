"""An autoregressive density over the codes: a mixture of Gaussians for each axis given the axes before it, fitted by
exact likelihood with one masked network (MADE, Germain et al. 2015)."""

from __future__ import annotations

from typing import cast

from ..config.samplers import ArConfig, SamplerConfig
from ..models.autoregressive import Autoregressive
from ..models.sphere import Constraint
from .likelihood import LikelihoodSampler


class ArSampler(LikelihoodSampler):
    """The fit."""

    title = "Autoregressive"

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> Autoregressive:
        keys = cast(ArConfig, config)
        return Autoregressive(latent_dim, keys.components, keys.hidden_dim, keys.depth, constraint)


SAMPLER = ArSampler
