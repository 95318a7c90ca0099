"""What happens in a run, as the workers report it to the driver and the driver to whoever shows or supervises it.

Shapes: P pictures, H W C height, width, channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..stage import Pictures
from .state import Position

# From the workers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A worker of the group has started on a node of this id."""

    node: str


@dataclass(frozen=True)
class Resumed:
    """The group trains on from a checkpoint."""

    position: Position


@dataclass(frozen=True)
class Phase:
    """Another phase of the work has begun: the name of a stage or a part of it, or `saving`."""

    phase: str


@dataclass(frozen=True)
class Progress:
    """A step of a stage; `speed` has images_per_s and, where the peak is known, mfu."""

    stage: str
    epoch: int
    step: int
    steps: int
    loss: float | None
    speed: dict[str, float]


@dataclass(frozen=True)
class EpochDone:
    """The end of an epoch, counted from 1; `numbers` has loss and seconds, and the stage's own."""

    stage: str
    epoch: int
    serial: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class Preview:
    """Pictures after an epoch, by kind: samples [P, H, W, C], reconstructions [P, 2, H, W, C]."""

    stage: str
    epoch: int
    pictures: Pictures


@dataclass(frozen=True)
class BadStep:
    """A step whose loss or gradients were not finite, so that it was not applied; the worker's rows in it."""

    rank: int
    epoch: int
    step: int
    rows: list[int]


@dataclass(frozen=True)
class CheckpointStarted:
    """A checkpoint is being written; training stood still for so many seconds."""

    stall_s: float


@dataclass(frozen=True)
class CheckpointDamaged:
    """A checkpoint is passed over."""

    step: int
    reason: str


# From the driver -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waiting:
    """There are `ready` of `needed` places for workers."""

    ready: int
    needed: int


@dataclass(frozen=True)
class Training:
    """A group has taken its first step, from a checkpoint at `position` if there was one.

    why, gap_s: of a group that is not the first: why it was started, and the seconds without a step before it.
    """

    workers: int
    position: Position | None
    why: str | None = None
    gap_s: float | None = None


@dataclass(frozen=True)
class WorkersLost:
    """The group failed and is started again."""

    why: str


@dataclass(frozen=True)
class NodeDraining:
    """A node of the run is being taken away; `resumes` elsewhere unless the driver runs there."""

    node: str
    resumes: bool


@dataclass(frozen=True)
class CapacityFound:
    """The cluster has room for so many workers."""

    workers: int


@dataclass(frozen=True)
class Stopping:
    """The run saves and stops."""


FromWorker = Joined | Resumed | Phase | Progress | EpochDone | Preview | BadStep | CheckpointStarted | CheckpointDamaged
Event = FromWorker | Waiting | Training | WorkersLost | NodeDraining | CapacityFound | Stopping


@dataclass(frozen=True)
class Message:
    """An event of a worker, and of which group of workers it is: a late one of a past group is ignored."""

    group: int
    event: FromWorker
