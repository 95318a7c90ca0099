"""What every stage of a run is, for the worker's one loop, the plan, the log and the reports.

A stage is a file of its name in this folder, which ends in `STAGE = <its class>`; `config.methods.METHODS` says which
stages a method goes through.

Shapes: B rows of this worker's batch, K numbers of a piggyback, P pictures, H W C height, width, channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..cluster.latents import LatentTable
from ..config.methods import METHODS
from ..config.run import Config
from ..datasets.reader import ImageRows

DONE = "done"  # the stage of a run that has none left
State = dict[str, Any]  # of one network: groups of tensors by name (`weights`, Adam's moments), and `updates`
Pictures = dict[str, np.ndarray]  # `samples` [P, H, W, C], `reconstructions` [P, 2, H, W, C]


@dataclass(frozen=True)
class StageInfo:
    """name: in positions, journals and metrics. title: for people. epochs: how many it takes."""

    name: str
    title: str
    epochs: int


@dataclass(frozen=True)
class StageCost:
    """Steps and operations of a whole stage; a multiply-add is two."""

    steps: int
    flops: float


@dataclass(frozen=True)
class StageContext:
    """What a worker gives its stages: the run, its images and codes, and where to compute.

    enter: called with the name of each phase of the work when it begins.
    """

    config: Config
    images: ImageRows
    latents: LatentTable
    device: torch.device
    enter: Callable[[str], None] = lambda phase: None


@dataclass(frozen=True)
class StageStep:
    """What one step did.

    steps: of the epoch. piggyback_K: sum over workers of what they added to the step. loss: mean over the real rows of
    all workers, where it is known already. rows_B: this worker's real rows. applied: False if the step was not finite,
    so that nothing moved. facts: further numbers; where the step ends an epoch, of the whole epoch. resumable: whether
    the run can be resumed behind this step.
    """

    epoch: int
    step: int
    steps: int
    piggyback_K: Tensor
    loss: float | None = None
    rows_B: Sequence[int] = ()
    applied: bool = True
    facts: Mapping[str, float] = field(default_factory=dict)
    resumable: bool = True
    ends_epoch: bool = False


class Stage(ABC):
    """A stage on one worker. All workers take the same steps.

    Args:
        networks: states by name of what earlier stages and earlier starts have trained.
    """

    preview_every: int  # epochs

    @abstractmethod
    def __init__(self, context: StageContext, networks: Mapping[str, State]) -> None: ...

    @classmethod
    @abstractmethod
    def info(cls, config: Config) -> StageInfo:
        """What it is called, and how long it is."""

    @classmethod
    @abstractmethod
    def cost(cls, config: Config, rows: int) -> StageCost:
        """What it takes on a data set of so many rows."""

    @abstractmethod
    def steps(self, epoch: int, step: int, piggyback: Callable[[], Tensor]) -> Iterator[StageStep]:
        """Train from `step` of `epoch` on, to the end; yields after every step.

        Args:
            piggyback: asked once a step for numbers [K], float32, whose sum over workers comes back with it.
        """

    @abstractmethod
    def lazy_state(self) -> dict[str, State]:
        """States of its networks behind the last resumable step, by name, as little copied as can be."""

    @abstractmethod
    def state(self) -> dict[str, State]:
        """The same as copies on the CPU of every worker. Collective."""

    def previews(self) -> Pictures:
        """Pictures of how it stands, on rank 0; nothing elsewhere. Collective."""
        return {}

    def image_flops(self) -> int:
        """Operations that one image takes in a step, forward and backward; 0 where it visits no images."""
        return 0


def stages_of(config: Config) -> list[type[Stage]]:
    """The stages of a run in their order."""
    return [cast(type[Stage], import_module(f"{__package__}.{name}").STAGE) for name in METHODS[config.method]]


def stage_infos(config: Config) -> dict[str, StageInfo]:
    """What the stages of a run are called and how long they are, by name, in their order."""
    return {info.name: info for info in (stage.info(config) for stage in stages_of(config))}


def numbered(infos: Mapping[str, StageInfo], name: str) -> str:
    """A stage for people: `stage 1 (GLO)`."""
    return f"stage {list(infos).index(name) + 1} ({infos[name].title})"


def final_weights(generator: State) -> dict[str, Tensor]:
    """What images are made with: the moving average where there is one, buffers as they are."""
    return generator["weights"] | generator.get("ema", {})
