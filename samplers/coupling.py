"""A coupling flow (RealNVP) over the codes: an invertible function of the noise, fitted by exact likelihood."""

from __future__ import annotations

from typing import cast

from ..config.samplers import CouplingConfig, SamplerConfig
from ..errors import UserError
from ..models.coupling import CouplingFlow
from ..models.sphere import Constraint
from .likelihood import LikelihoodSampler


class CouplingSampler(LikelihoodSampler):
    """The fit."""

    title = "Coupling flow"

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> CouplingFlow:
        if latent_dim < 2:
            raise UserError("sampler.kind=coupling needs codes of 2 dimensions or more; raise generator.latent_dim")
        keys = cast(CouplingConfig, config)
        return CouplingFlow(latent_dim, keys.layers, keys.components, keys.hidden_dim, keys.depth, constraint)


SAMPLER = CouplingSampler
