"""The section of generators that are trained behind an encoder: `method: autoencoder`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .samplers import PriorConfig, SamplerConfig
from .schedule import ScheduleConfig
from .section import Fraction, Positive, Section, Trait


class AutoencoderConfig(Section):
    """Training of an encoder and the generator behind it (method: autoencoder)."""

    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(ge=1, description="passes over the data set")
    batch_size: Annotated[int, Trait.IN_REGISTRY] = Field(
        64, ge=1, description="global batch, over all workers; independent of their number"
    )
    kl: Annotated[float, Trait.IN_REGISTRY] = Field(
        1.0,
        ge=0,
        description="weight of the divergence of a code's distribution from N(0, I), in nats: 1 beside a likelihood is "
        "the published VAE; 0: codes are points",
    )
    lr: Annotated[Positive, Trait.IN_REGISTRY] = Field(1e-3, description="learning rate of encoder and generator")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="Adam's betas, for both")
    schedule: ScheduleConfig = ScheduleConfig()
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")

    def fault(self, sampler: SamplerConfig) -> str | None:
        """What is wrong with it beside this sampler, and what to do."""
        if not isinstance(sampler, PriorConfig):
            return None
        if not self.kl:
            return (
                "autoencoder.kl=0 leaves codes anywhere, and sampler.kind=prior draws them from a fixed distribution; "
                "set another sampler.kind, such as gmm or ot"
            )
        if sampler.shape != "normal" or sampler.categories:
            return "autoencoder.kl draws codes towards N(0, I); set sampler.shape=normal and sampler.categories=0"
        return None
