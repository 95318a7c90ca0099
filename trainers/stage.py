"""Interface of a stage, as used by the worker's loop, the plan, the log and the reports.

A stage is a file in this folder that ends in `STAGE = <its class>`; `config.methods.METHODS` lists the stages of a
method by file name.

Shapes: B rows of this worker's batch, K numbers of a piggyback.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from ..cluster.latents import LatentTable
from ..config.methods import METHODS
from ..config.run import Config
from ..datasets.reader import ImageRows
from .previews import Pictures

DONE = "done"  # the stage in the position of a finished run
ENCODER = "encoder"  # network name, of the stages that have one
State = dict[str, Any]  # of one network: groups of tensors by name (`weights`, Adam's moments), and `updates`


@dataclass(frozen=True)
class StageInfo:
    """Description of a stage. name: in positions, journals and metrics. title: in output. epochs: number of epochs."""

    name: str
    title: str
    epochs: int


@dataclass(frozen=True)
class StageCost:
    """Steps and operations (a multiply-add is two) of a whole stage."""

    steps: int
    flops: float


@dataclass(frozen=True)
class StageContext:
    """What a worker provides to its stages: the configuration, its images and codes, and its device.

    enter: called with the name of a phase when it begins.
    """

    config: Config
    images: ImageRows
    latents: LatentTable
    device: torch.device
    enter: Callable[[str], None] = lambda phase: None


@dataclass(frozen=True)
class StageStep:
    """Result of one step.

    steps: number of steps in the epoch. piggyback_K: sum of the piggyback over workers. loss: mean over the real rows
    of all workers, if there are any and it is already known. rows_B: this worker's real rows. applied: False if the
    step was not finite and so changed nothing; one without real rows does not count among these. facts: further
    numbers, of the whole epoch if the step ends one. resumable: whether a checkpoint after this step can be resumed
    from. warning: one line for the user, equal on all workers.
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
    warning: str = ""


class Stage(ABC):
    """A stage on one worker. All workers take the same steps.

    Args:
        networks: states by name of the networks trained by earlier stages and earlier starts.
    """

    preview_every: int  # epochs

    @abstractmethod
    def __init__(self, context: StageContext, networks: Mapping[str, State]) -> None: ...

    @classmethod
    @abstractmethod
    def info(cls, config: Config) -> StageInfo:
        """Name, title and number of epochs."""

    @classmethod
    @abstractmethod
    def cost(cls, config: Config, rows: int) -> StageCost:
        """Cost on a data set of `rows` rows."""

    @abstractmethod
    def steps(self, epoch: int, step: int, piggyback: Callable[[], Tensor]) -> Iterator[StageStep]:
        """Train from `step` of `epoch` to the end; yields after every step.

        Args:
            piggyback: called once per step for numbers [K], float32, whose sum over workers is returned with it.
        """

    @abstractmethod
    def lazy_state(self) -> dict[str, State]:
        """States of its networks after the last resumable step, by name, copied as little as possible."""

    @abstractmethod
    def state(self) -> dict[str, State]:
        """Their states at the end of an epoch, ready to draw with, as copies on every worker's CPU. Collective."""

    def previews(self) -> Pictures:
        """This worker's part of preview pictures. Collective."""
        return {}

    def image_flops(self) -> int:
        """Operations of the model per image, forward and backward, without recomputation; 0 if it visits no images."""
        return 0


def stages_of(config: Config) -> list[type[Stage]]:
    """The stages of a run, in order."""
    return [cast(type[Stage], import_module(f"{__package__}.{name}").STAGE) for name in METHODS[config.method]]


def stage_infos(config: Config) -> dict[str, StageInfo]:
    """Descriptions of the stages of a run by name, in order."""
    return {info.name: info for info in (stage.info(config) for stage in stages_of(config))}


def first_epochs(config: Config) -> int:
    """Epochs of the first stage, which trains the generator."""
    return next(iter(stage_infos(config).values())).epochs


def numbered(infos: Mapping[str, StageInfo], name: str) -> str:
    """Format the number and title of a stage: `stage 1 (GLO)`."""
    return f"stage {list(infos).index(name) + 1} ({infos[name].title})"


def final_weights(generator: State) -> dict[str, Tensor]:
    """Weights and buffers for generating images: the moving average, where there is one and as far as it reaches."""
    return generator["weights"] | generator.get("ema", {})
