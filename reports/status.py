"""status.json: how a run stands, in a small file beside its checkpoints.

The driver of a run writes it (`trainers.run.status_file`), and whoever can read the checkpoints reads it: the head of a
cluster, where the run began, may be gone.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..storage.base import MissingObject, Store

FILE = "status.json"
WRITE_EVERY_S = 30.0
STALE_S = 180.0  # a file this old was not written as it should have been; clocks may differ by a part of it
GIB = 1 << 30
ENDS = ("finished", "stopped", "failed")


Count = Annotated[int, Field(ge=0, lt=2**62)]


class Record(BaseModel):
    """Base of the parts of the file; what a newer version has written besides is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class DeviceUse(Record):
    """A worker's device. use: share of its time (of a worker's cores on CPUs). memory, total: bytes used and there."""

    rank: Count
    node: str
    device: str
    gpu: bool
    use: float | None = Field(None, ge=0)
    memory: Count
    total: Count


class Measured(Record):
    """A metric that was measured of the run's model after `step`, a step of the whole run."""

    metric: str
    value: float
    step: Count


class Status(Record):
    """How a run stands. Times are seconds since 1970, by the clock of the driver's host.

    stage: what it does now, in words. epoch: that it is in, or the last one of the stage that is done. done: share of
    the stage. left_s: seconds to the end of the run, over all stages and the evaluation. images: of the evaluation,
    drawn or read, and in all. checkpoint_step, checkpoint_at: of the last one that is complete. measured: the last
    score while training; best: the best one.
    """

    name: str
    state: Literal["starting", "running", "stopping", "finished", "stopped", "failed"] = "starting"
    message: str = ""
    exit_status: int | None = None
    host: str = ""
    began: float
    updated: float
    stage: str = ""
    epoch: Count | None = None
    epochs: Count | None = None
    done: float | None = Field(None, ge=0, le=1)
    left_s: float | None = None
    images: tuple[Count, Count] | None = None
    loss: float | None = None
    images_per_s: float | None = None
    mfu: float | None = None
    workers: Count | None = None
    checkpoint_step: Count | None = None
    checkpoint_at: float | None = None
    devices: tuple[DeviceUse, ...] = ()
    mlflow: str | None = None
    measured: Measured | None = None
    best: Measured | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    def is_stale(self, now: float) -> bool:
        """Whether its writer has died, hangs, or cannot reach the store."""
        return not self.ended and now - self.updated > STALE_S


def status_folder(checkpoint_url: str) -> str:
    """The folder of the file, beside that of the checkpoints."""
    return checkpoint_url.rstrip("/").rpartition("/")[0]


def read_status(store: Store) -> Status | None:
    """The status of the run in a folder, None if there is none yet.

    Raises:
        UserError: it is damaged, or of another version. EnvironmentFault: the store does not answer.
    """
    try:
        return Status.model_validate_json(store.read(FILE))
    except MissingObject:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{store.url}/{FILE} is damaged: {first['msg']}") from error


def write_status(store: Store, status: Status) -> None:
    """Write the file, as a whole or not at all."""
    store.write(FILE, (status.model_dump_json(indent=1) + "\n").encode())


# In words --------------------------------------------------------------------------------------


def summary(status: Status, now: float | None = None) -> str:
    """One line: `stage 1 (GLO)  epoch 6/60 ...`, `waiting for capacity: room for 1 of 2 workers`, `stopped: why`."""
    if status.ended:
        return ": ".join(word for word in (status.state, status.message) if word)
    stage = f"stopping: {status.stage}" if status.state == "stopping" else status.stage
    if numbers := progress(status, now):
        return "  ".join(word for word in (stage, numbers, status.message) if word)
    return ": ".join(word for word in (stage, status.message) if word)


def progress(status: Status, now: float | None = None) -> str:
    """How far the stage is and how fast: `epoch 6/60  12 min left  loss 0.2378  1,004 img/s  34% MFU`."""
    now = time.time() if now is None else now
    words = []
    if status.epoch is not None and status.epochs is not None:
        words.append(f"epoch {status.epoch}/{status.epochs}")
    if status.images is not None:
        words.append(f"{status.images[0]:,} of {status.images[1]:,} images")
    if (left := left_in_words(status, now)) is not None:
        words.append(f"{left} left")  # early: a narrow terminal cuts the end off
    if status.loss is not None:
        words.append(f"loss {status.loss:.4f}")
    if status.images_per_s is not None:
        rate = status.images_per_s
        words.append(f"{rate:,.0f} img/s" if rate >= 10 else f"{rate:.2g} img/s")  # 1024 px on a CPU: not 0 img/s
    if status.mfu is not None:
        words.append(f"{status.mfu:.0%} MFU")
    return "  ".join(words)


def health(status: Status, now: float | None = None) -> str:
    """Its last checkpoint, its scores and its devices: `checkpoint 4 min ago  2 GPUs 93%, 61.0 of 139.0 GiB`."""
    now = time.time() if now is None else now
    words = checkpoint_in_words(status, now), scores_in_words(status), devices_in_words(status)
    return "  ".join(word for word in words if word)


def checkpoint_in_words(status: Status, now: float) -> str:
    """The age of the last complete checkpoint; empty if none is known."""
    return f"checkpoint {duration(now - status.checkpoint_at)} ago" if status.checkpoint_at is not None else ""


def scores_in_words(status: Status) -> str:
    """The last score while training, and the best: `fd_inception 12.9, best 11.3 at step 4200`; empty without one."""
    last, best = status.measured, status.best
    if best is None:
        return f"{last.metric} {last.value:.4g}" if last is not None else ""
    if last is None or last.metric != best.metric:
        return f"best {best.metric} {best.value:.4g} at step {best.step}"
    return f"{last.metric} {last.value:.4g}, best {best.value:.4g} at step {best.step}"


def devices_in_words(status: Status) -> str:
    """Mean use and largest memory of the devices; empty if unknown."""
    if not status.devices:
        return ""
    kind = "GPU" if all(device.gpu for device in status.devices) else "worker"
    count = f"{len(status.devices)} {kind}{'s' if len(status.devices) > 1 else ''}"
    uses = [device.use for device in status.devices if device.use is not None]
    use = f" {sum(uses) / len(uses):.0%}," if uses else ","
    fullest = max(status.devices, key=lambda device: device.memory / max(device.total, 1))
    return f"{count}{use} {fullest.memory / GIB:.1f} of {fullest.total / GIB:.1f} GiB"


def left_in_words(status: Status, now: float) -> str | None:
    """The time to the end of the run; None if it is unknown or has ended."""
    if status.left_s is None or status.ended:
        return None
    return duration(max(0.0, status.left_s - max(0.0, now - status.updated)))


def duration(seconds: float) -> str:
    """A time in two units at most: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    seconds = max(0, round(seconds))
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
