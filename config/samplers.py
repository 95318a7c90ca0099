"""Samplers: one section per kind. The implementation is the module of that name in samplers/."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .schedule import ScheduleConfig
from .section import Positive, Section, Trait


class SamplerConfig(Section):
    """The map from normal noise to latent codes; `sampler.kind` selects it."""

    kind: str

    @property
    def untrainable(self) -> str | None:
        """What is wrong with a combination of keys that can be read but not trained, and what to do."""
        return None


class NeighbourSearchConfig(Section):
    """How the nearest candidate of every code is found."""

    kind: Literal["exact", "ivf"] = Field("exact", description="ivf: approximate, for tens of millions of rows")
    cells: int | None = Field(None, ge=1, description="ivf: cells of the inverted file; empty takes 4 sqrt(M)")
    probes: int = Field(16, ge=1, description="ivf: cells searched per code; higher recall, slower")


class ImleConfig(SamplerConfig):
    """Stage 2 (IMLE): the mapping T: noise -> latent code."""

    kind: Literal["imle"] = Field("imle", description="how noise becomes a code; every kind has its own further keys")
    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(50, ge=1, description="rounds of fresh candidates and matches")
    batch_size: int = Field(128, ge=1, description="global batch, over all workers")
    noise_dim: Annotated[int, Trait.IN_REGISTRY] = Field(32, ge=1, description="dimension of the noise e")
    hidden_dim: Annotated[int, Trait.IN_REGISTRY] = Field(128, ge=1, description="width of both hidden layers")
    statistics: Annotated[Literal["noise", "batch"], Trait.IN_REGISTRY] = Field(
        "noise",
        description="BatchNorm statistics of T: fixed, from fresh noise; or of each batch of matches (as published)",
    )
    lr: Annotated[Positive, Trait.SCHEDULABLE] = Field(1e-3, description="learning rate of the mapping (Adam)")
    weight_decay: Annotated[float, Trait.SCHEDULABLE] = Field(1e-5, ge=0, description="weight decay of the mapping")
    candidates: Positive = Field(2.0, description="fresh candidates per row and epoch (M = candidates x N)")
    search: NeighbourSearchConfig = NeighbourSearchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")

    @property
    def untrainable(self) -> str | None:
        """Batches of a single row under batch statistics; those of two rows leave one over if their number is odd."""
        if self.statistics == "noise" or self.batch_size > 2:
            return None
        return (
            f"sampler.batch_size={self.batch_size} with sampler.statistics=batch would train on batches of one row, "
            "which normalised by its own statistics is zero: T would be the same for every noise, and the loss exactly "
            "1; use at least 3, or set sampler.statistics=noise"
        )


class GaussianConfig(SamplerConfig):
    """A Gaussian fitted to the codes in closed form: the sampling of GLO, and the baseline."""

    kind: Literal["gaussian"] = "gaussian"


# One entry per kind.
SAMPLERS: dict[str, type[SamplerConfig]] = {"imle": ImleConfig, "gaussian": GaussianConfig}


def _tag(value: Any) -> str | None:
    """The tag of a section given as a dictionary or a model; the default kind is `imle`."""
    if isinstance(value, dict):
        return f"<{value.get('kind', 'imle')}>"
    return f"<{value.kind}>" if isinstance(value, SamplerConfig) else None


TAGS = tuple(f"<{kind}>" for kind in SAMPLERS)  # parts of error locations that are not keys
if TYPE_CHECKING:
    AnySampler = SamplerConfig
else:
    AnySampler = Annotated[
        reduce(or_, [Annotated[section, Tag(f"<{kind}>")] for kind, section in SAMPLERS.items()]), Discriminator(_tag)
    ]
