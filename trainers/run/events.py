"""Events of a run, sent from the workers to the driver and from the driver to the log and the hooks.

Previews travel as tiles: reduced images, and whole ones as WebP.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...cluster.checkpoints.best import Best
from ...reports.status import DeviceUse
from ..previews import Pictures
from .evaluation import Evaluated
from .state import Position

# From the workers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A worker of the group has started on the node with this id."""

    node: str


@dataclass(frozen=True)
class Resumed:
    """The group has resumed from a checkpoint."""

    position: Position


@dataclass(frozen=True)
class Phase:
    """A phase has begun: the name of a stage or of a part of it, or `saving`."""

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
class StepsDone:
    """Numbers of the last `tracking.every_steps` steps, up to the step `serial` of the run."""

    stage: str
    serial: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class EpochDone:
    """The end of an epoch, counted from 1; `numbers` has loss, seconds and the numbers of the stage."""

    stage: str
    epoch: int
    serial: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What samples measured after an epoch, counted from 1, at the checkpoint of step `serial`.

    numbers: by key of the result. found: by the metric by which checkpoints are compared; None if it was not finite.
    best: the best checkpoint so far, this one included. seconds: for which training paused.
    """

    stage: str
    epoch: int
    serial: int
    numbers: dict[str, float]
    found: Best | None
    best: Best | None
    seconds: float


@dataclass(frozen=True)
class Preview:
    """The part of worker `rank`, of `workers`, of the pictures after an epoch, which ended with step `serial`."""

    stage: str
    epoch: int
    serial: int
    rank: int
    workers: int
    pictures: Pictures


@dataclass(frozen=True)
class BadStep:
    """A step that was not applied because the loss or gradients were not finite; `rows` are the worker's rows."""

    rank: int
    epoch: int
    step: int
    rows: list[int]


@dataclass(frozen=True)
class Warned:
    """Something about the training that its user should know, in one line."""

    stage: str
    text: str


@dataclass(frozen=True)
class CheckpointStarted:
    """A checkpoint is being written; training paused for `stall_s` seconds."""

    stall_s: float


@dataclass(frozen=True)
class CheckpointSaved:
    """The checkpoint of a step of the run is complete."""

    step: int


@dataclass(frozen=True)
class DeviceSampled:
    """The use of a worker's device; `numbers` has that of its node and device under MLflow's names."""

    use: DeviceUse
    numbers: dict[str, float]


@dataclass(frozen=True)
class CheckpointDamaged:
    """A damaged checkpoint was skipped."""

    step: int
    reason: str


@dataclass(frozen=True)
class Evaluating:
    """Progress of the evaluation: images that a worker has worked on, of all its images."""

    rank: int
    images: int
    total: int


# From the driver -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waiting:
    """The cluster has places for `ready` of `needed` workers."""

    ready: int
    needed: int


@dataclass(frozen=True)
class Training:
    """A group has taken its first step, from a checkpoint at `position` if there was one.

    why, gap_s: for every group but the first: why it was started, and the seconds without a step before it.
    """

    workers: int
    position: Position | None
    why: str | None = None
    gap_s: float | None = None


@dataclass(frozen=True)
class WorkersLost:
    """The group failed and will be restarted."""

    why: str


@dataclass(frozen=True)
class NodeDraining:
    """A node of the run is draining. resumes: the run resumes elsewhere, unless the driver is on that node."""

    node: str
    resumes: bool


@dataclass(frozen=True)
class CapacityFound:
    """The cluster has capacity for `workers` workers."""

    workers: int


@dataclass(frozen=True)
class Stopping:
    """The run saves and stops."""


FromWorker = (
    Joined
    | Resumed
    | Phase
    | Progress
    | StepsDone
    | EpochDone
    | Measured
    | Preview
    | BadStep
    | Warned
    | CheckpointStarted
    | CheckpointSaved
    | CheckpointDamaged
    | DeviceSampled
    | Evaluating
    | Evaluated
)
Event = FromWorker | Waiting | Training | WorkersLost | NodeDraining | CapacityFound | Stopping


@dataclass(frozen=True)
class Message:
    """An event of a worker, with the number of its group: late events of past groups are ignored."""

    group: int
    event: FromWorker
