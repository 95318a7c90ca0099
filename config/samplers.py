"""Samplers: one section per kind. The implementation is the module of that name in samplers/."""

from __future__ import annotations

import math
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from .schedule import ScheduleConfig
from .section import Positive, Section, Trait


class SamplerConfig(Section):
    """The map from normal noise to latent codes; `sampler.kind` selects it."""

    kind: str
    copies: ClassVar[bool] = False  # whether its draws may be training codes

    @property
    def untrainable(self) -> str | None:
        """What is wrong with a combination of keys that can be read but not trained, and what to do."""
        return None


class NeighbourSearchConfig(Section):
    """How the nearest candidate of every code is found."""

    kind: Literal["exact", "ivf"] = Field("exact", description="ivf: approximate, for tens of millions of rows")
    cells: int | None = Field(None, ge=1, description="ivf: cells of the inverted file; empty takes 4 sqrt(M)")
    probes: int = Field(16, ge=1, description="ivf: cells searched per code; higher recall, slower")


class CosineScheduleConfig(ScheduleConfig):
    """Cosine by default. A separate class, so that setting one key keeps the other defaults."""

    kind: Literal["constant", "halving", "cosine"] = Field("cosine", description="shape of the factor over epochs")


class ImleKeys(SamplerConfig):
    """Keys of IMLE and its relatives: the mapping T: noise -> latent code."""

    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(50, ge=1, description="rounds of fresh candidates and matches")
    batch_size: int = Field(128, ge=1, description="global batch, over all workers")
    max_steps_per_epoch: int | None = Field(
        None,
        ge=1,
        description="where the rows make more batches than this of batch_size, the batches are larger, so that the "
        "steps of an epoch do not grow with the rows; empty: no bound (published)",
    )
    noise_dim: Annotated[int, Trait.IN_REGISTRY] = Field(32, ge=1, description="dimension of the noise e")
    hidden_dim: Annotated[int, Trait.IN_REGISTRY] = Field(128, ge=1, description="width of the hidden layers")
    depth: Annotated[int, Trait.IN_REGISTRY] = Field(2, ge=1, le=32, description="hidden layers")
    activation: Annotated[Literal["relu", "silu", "leaky-relu"], Trait.IN_REGISTRY] = Field(
        "relu", description="after each hidden layer (published: relu)"
    )
    normalisation: Annotated[Literal["batch", "layer", "none"], Trait.IN_REGISTRY] = Field(
        "batch", description="of each hidden layer, before its activation (published: batch)"
    )
    statistics: Annotated[Literal["noise", "batch"], Trait.IN_REGISTRY] = Field(
        "noise",
        description="BatchNorm statistics of T: fixed, from fresh noise; or of each batch of matches (as published)",
    )
    constraint: Annotated[Literal["none", "sphere"] | None, Trait.IN_REGISTRY] = Field(
        None, description="projection of T's output; empty: that of the codes (published: none)"
    )
    lr: Annotated[Positive, Trait.SCHEDULABLE] = Field(1e-3, description="learning rate of the mapping (Adam)")
    weight_decay: Annotated[float, Trait.SCHEDULABLE] = Field(1e-5, ge=0, description="weight decay of the mapping")
    candidates: Positive = Field(2.0, description="fresh candidates per row and epoch (M = candidates x N)")
    chamfer: float = Field(
        0.0,
        ge=0,
        description="weight of a second pull: each candidate towards its nearest code; for codes in separate groups, "
        "where 1 leaves few draws between them (published: 0)",
    )
    noise_on_match: float = Field(0.0, ge=0, description="standard deviation of new noise on each matched e, per epoch")
    search: NeighbourSearchConfig = NeighbourSearchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")

    def batch_of(self, rows: int) -> int:
        """Rows of a global batch, at most, where an epoch has so many rows."""
        fewest = 1 if self.max_steps_per_epoch is None else -(-rows // self.max_steps_per_epoch)
        return max(self.batch_size, fewest)

    @property
    def untrainable(self) -> str | None:
        """Batches of a single row under batch statistics; those of two rows leave one over if their number is odd."""
        if self.normalisation != "batch" or self.statistics == "noise" or self.batch_size > 2:
            return None
        return (
            f"sampler.batch_size={self.batch_size} with sampler.statistics=batch would train on batches of one row, "
            "which normalised by its own statistics is zero: T would be the same for every noise, and the loss exactly "
            "1; use at least 3, or set sampler.statistics=noise"
        )


class ImleConfig(ImleKeys):
    """Stage 2 (IMLE): the mapping T: noise -> latent code."""

    kind: Literal["imle"] = Field("imle", description="how noise becomes a code; every kind has its own further keys")
    staleness: int = Field(1, ge=1, description="epochs that a match is kept for (published: 1)")


class RsImleConfig(ImleKeys):
    """IMLE without the candidates that lie near a code already (RS-IMLE)."""

    kind: Literal["rs-imle"] = "rs-imle"
    epsilon: Annotated[Positive, Trait.IN_REGISTRY] = Field(
        0.1, description="candidates nearer than this to any code are dropped"
    )


class AdaptiveImleConfig(ImleKeys):
    """IMLE that keeps the match of a code until T has come closer by a share of the distance (Adaptive IMLE)."""

    kind: Literal["adaptive-imle"] = "adaptive-imle"
    change: Annotated[float, Field(gt=0, lt=1), Trait.IN_REGISTRY] = Field(
        0.1, description="a code is matched anew when its distance is below (1 - change) of that at its last match"
    )


class TrainedConfig(SamplerConfig):
    """Keys of the samplers whose network is trained with Adam on batches of codes."""

    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(100, ge=1, description="passes over the codes")
    batch_size: int = Field(256, ge=1, description="global batch, over all workers")
    hidden_dim: Annotated[int, Trait.IN_REGISTRY] = Field(256, ge=1, description="width of the hidden layers")
    depth: Annotated[int, Trait.IN_REGISTRY] = Field(3, ge=1, le=32, description="hidden layers")
    lr: Annotated[Positive, Trait.SCHEDULABLE] = Field(1e-3, description="learning rate (Adam)")
    weight_decay: Annotated[float, Trait.SCHEDULABLE] = Field(0.0, ge=0, description="weight decay")
    schedule: CosineScheduleConfig = CosineScheduleConfig()
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")


class GaussianConfig(SamplerConfig):
    """A Gaussian fitted to the codes in closed form: the sampling of GLO, and the baseline."""

    kind: Literal["gaussian"] = "gaussian"


class GmmConfig(SamplerConfig):
    """A mixture of Gaussians with full covariances, fitted by expectation maximisation."""

    kind: Literal["gmm"] = "gmm"
    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(30, ge=1, description="rounds of expectation maximisation")
    components: Annotated[int, Trait.IN_REGISTRY] = Field(50, ge=1, description="Gaussians of the mixture")
    floor: Positive = Field(1e-3, description="added to every variance, as a share of the mean variance of the codes")


class HeightsConfig(Section):
    """Semi-discrete optimal transport before the training of a flow, by keys as those of sampler.kind=ot."""

    steps: int = Field(400, ge=1, description="semidiscrete: steps on the heights")
    samples: Positive = Field(2.0, description="semidiscrete: fresh points of N(0, I) per row and step")
    lr: Positive = Field(0.1, description="semidiscrete: learning rate of the heights, in units of the codes' spread")


class OtConfig(SamplerConfig):
    """Semi-discrete optimal transport from N(0, I) to the codes (the AE-OT map)."""

    copies: ClassVar[bool] = True
    kind: Literal["ot"] = "ot"
    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(20, ge=1, description="rounds of steps on the heights")
    steps: int = Field(20, ge=1, description="steps per epoch")
    samples: Positive = Field(2.0, description="fresh points of N(0, I) per row and step")
    lr: Annotated[Positive, Trait.SCHEDULABLE] = Field(
        0.1, description="learning rate of the heights (Adam), in units of the codes' spread"
    )
    schedule: CosineScheduleConfig = CosineScheduleConfig()
    extension: Annotated[Literal["none", "simplex", "pair"], Trait.IN_REGISTRY] = Field(
        "pair",
        description="none: draws are training codes; simplex: barycentric mixtures; pair: mixtures with a neighbour",
    )
    neighbours: int = Field(20, ge=2, description="pair: cells nearest to a draw that are looked at, its own included")
    angle: float = Field(
        0.7, ge=0, le=math.pi, description="pair: largest angle between two cells' normals that are mixed"
    )
    share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="pair: share of the neighbour")


class FlowConfig(TrainedConfig):
    """A velocity field from noise to codes (flow matching)."""

    kind: Literal["flow"] = "flow"
    coupling: Annotated[Literal["independent", "minibatch", "semidiscrete"], Trait.IN_REGISTRY] = Field(
        "independent",
        description="noise of a code: any; by exact assignment in a batch; by optimal transport to all codes",
    )
    velocity: Annotated[Literal["instant", "mean"], Trait.IN_REGISTRY] = Field(
        "instant", description="mean: the mean velocity between two times is trained, for samples in one or few steps"
    )
    activation: Annotated[Literal["silu", "relu"], Trait.IN_REGISTRY] = Field(
        "silu", description="after each hidden layer; relu learns the edges of separate groups of codes sooner"
    )
    steps: int = Field(
        20, ge=1, description="steps of a sample; 1 to 4 are enough for velocity=mean; 8 for separate groups of codes"
    )
    heights: HeightsConfig = HeightsConfig()


class DriftConfig(TrainedConfig):
    """One-step generator moved along a drift: towards the codes and away from its own samples."""

    kind: Literal["drift"] = "drift"
    noise_dim: Annotated[int, Trait.IN_REGISTRY] = Field(32, ge=1, description="dimension of the noise e")
    activation: Annotated[Literal["silu", "relu"], Trait.IN_REGISTRY] = Field(
        "relu", description="after each hidden layer; relu learns the edges of separate groups of codes sooner"
    )
    temperatures: tuple[Positive, ...] = Field(
        (0.02, 0.05, 0.2), min_length=1, description="scales of the kernel, as shares of the mean distance of a batch"
    )


class CouplingConfig(TrainedConfig):
    """An invertible network of couplings (RealNVP), with exact likelihood."""

    kind: Literal["coupling"] = "coupling"
    layers: Annotated[int, Trait.IN_REGISTRY] = Field(8, ge=2, description="couplings, one after the other")
    components: Annotated[int, Trait.IN_REGISTRY] = Field(
        1,
        ge=1,
        description="Gaussians of an axis: in coupling, 1 is affine (RealNVP), more are mixtures (as in Flow++)",
    )
    blur: float = Field(
        0.1, ge=0, description="standard deviation of noise added to codes in training, in units of that of the codes"
    )


class ArConfig(TrainedConfig):
    """An autoregressive density: a mixture for each axis given those before, with exact likelihood."""

    kind: Literal["ar"] = "ar"
    components: Annotated[int, Trait.IN_REGISTRY] = Field(10, ge=1, description="Gaussians of an axis")
    blur: float = Field(
        0.1, ge=0, description="standard deviation of noise added to codes in training, in units of that of the codes"
    )


class PriorConfig(SamplerConfig):
    """A fixed distribution of codes, fitted to nothing: what the generator of method=gan is trained with."""

    kind: Literal["prior"] = "prior"
    shape: Annotated[Literal["normal", "uniform", "sphere"], Trait.IN_REGISTRY] = Field(
        "normal", description="normal: N(0, 1) on each axis; uniform: from -1 to 1; sphere: uniform, of unit norm"
    )
    categories: Annotated[int, Trait.IN_REGISTRY] = Field(
        0,
        ge=0,
        le=4096,
        description="the last so many numbers of a code are a category: one is 1, the others 0",
    )


# One entry per kind.
SAMPLERS: dict[str, type[SamplerConfig]] = {
    section.model_fields["kind"].default: section
    for section in (
        ImleConfig,
        GaussianConfig,
        GmmConfig,
        RsImleConfig,
        AdaptiveImleConfig,
        OtConfig,
        FlowConfig,
        DriftConfig,
        CouplingConfig,
        ArConfig,
        PriorConfig,
    )
}


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
