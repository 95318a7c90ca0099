"""The state of a run by its events, in the driver: the one source of bar, log, status.json and dashboard."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from ...cluster.checkpoints.best import Best
from ...config.run import Config
from ...errors import ExitStatus, GlannError, one_line
from ...reports.status import DeviceUse, Measured, Status
from ..plan.remaining import Remaining
from ..stage import numbered, stage_infos
from . import events
from .evaluation import EVALUATION, Evaluated
from .events import Event
from .recovery import RunStopped

STARTING, PACKAGING = "starting the workers", "packaging"
NO_NUMBERS: dict[str, Any] = dict.fromkeys(
    ("epoch", "epochs", "done", "images", "loss", "images_per_s", "mfu", "left_s"), None
)


class Telemetry:
    """Status of a run. Events come from one thread; `status` may be called from any.

    Args:
        mlflow: address of the run's page, or of the tracking server.
        best: the best checkpoint of earlier starts.
    """

    def __init__(
        self,
        config: Config,
        remaining: Remaining,
        mlflow: str | None = None,
        clock: Callable[[], float] = time.time,
        best: Best | None = None,
    ) -> None:
        self.stages, self.remaining, self.clock = stage_infos(config), remaining, clock
        self.evaluated: dict[int, tuple[int, int]] = {}  # images and their total by rank
        self.devices: dict[int, DeviceUse] = {}
        self.lock = threading.Lock()
        now, host = clock(), socket.gethostname()
        self.current = Status(name=config.name, host=host, began=now, updated=now, stage=STARTING, mlflow=mlflow)
        self.update(best=score_of(best))

    def status(self) -> Status:
        """The present status."""
        with self.lock:
            left_s = None if self.current.ended else self.remaining.seconds()
            devices = tuple(self.devices[rank] for rank in sorted(self.devices))
            return self.current.model_copy(update={"updated": self.clock(), "left_s": left_s, "devices": devices})

    def __call__(self, event: Event) -> None:
        """Take an event into account."""
        with self.lock:
            match event:
                case events.Progress():
                    self.on_progress(event)
                case events.EpochDone():
                    self.on_epoch(event)
                case events.Evaluating():
                    self.on_evaluating(event)
                case events.DeviceSampled():
                    self.remaining.device = event.use.device
                    self.devices[event.use.rank] = event.use
                case events.CheckpointSaved():
                    self.update(checkpoint_step=event.step, checkpoint_at=self.clock())
                case events.Measured():
                    self.update(measured=score_of(event.found), best=score_of(event.best))
                case events.Training():
                    self.restart(event.workers, "running", STARTING, "")
                case events.WorkersLost():
                    self.restart(0, "starting", "starting the workers again", event.why)
                case events.Waiting():
                    found = f"room for {event.ready} of {event.needed} workers"
                    self.restart(0, "starting", "waiting for capacity", found)
                case events.NodeDraining():
                    self.update(message=f"node {event.node} is being taken away")
                case events.Stopping():
                    self.update(state="stopping")
                case Evaluated():
                    self.update(**NO_NUMBERS, stage=PACKAGING)
                case _:
                    pass

    def update(self, **changes: Any) -> None:
        self.current = self.current.model_copy(update=changes)

    def enter(self, stage: str) -> None:
        """Forget the numbers of another stage."""
        if self.current.stage != stage:
            self.update(**NO_NUMBERS, stage=stage)

    def on_progress(self, event: events.Progress) -> None:
        epochs = self.stages[event.stage].epochs
        share = (event.epoch + event.step / max(event.steps, 1)) / max(epochs, 1)
        self.enter(numbered(self.stages, event.stage))
        self.take(event.stage, share, event.epoch + 1, event.loss, event.speed)

    def on_epoch(self, event: events.EpochDone) -> None:
        share = event.epoch / max(self.stages[event.stage].epochs, 1)
        self.enter(numbered(self.stages, event.stage))
        self.take(event.stage, share, event.epoch, event.numbers.get("loss"), event.numbers)

    def take(self, stage: str, share: float, epoch: int, loss: float | None, speed: dict[str, float]) -> None:
        self.remaining.advance(stage, share)
        if "images_per_s" in speed:
            self.remaining.images_per_s = speed["images_per_s"]
        known: dict[str, float] = {name: speed[name] for name in ("images_per_s", "mfu") if name in speed}
        if loss is not None:
            known["loss"] = loss if math.isfinite(loss) else math.nan
        self.update(epoch=epoch, epochs=self.stages[stage].epochs, done=min(share, 1.0), **known)

    def on_evaluating(self, event: events.Evaluating) -> None:
        """Add up the progress of all workers; those that were not heard of yet have as much to do as this one."""
        self.evaluated[event.rank] = event.images, event.total
        images, total = (sum(numbers) for numbers in zip(*self.evaluated.values(), strict=True))
        total = max(total, event.total * (self.current.workers or 1), 1)
        self.enter(EVALUATION)
        self.remaining.advance(EVALUATION, images / total)
        self.update(images=(images, total), done=min(images / total, 1.0))

    def restart(self, workers: int, state: Literal["starting", "running"], stage: str, message: str) -> None:
        """A group of workers starts training, or is waited for (`workers` is 0)."""
        self.remaining.restart(workers or self.remaining.workers)
        self.evaluated, self.devices = {}, {}
        kept = self.current.state if self.current.state == "stopping" else state
        self.update(**NO_NUMBERS, state=kept, stage=stage, message=message, workers=workers or None)

    def end(self, error: BaseException | None) -> None:
        """The run has ended, by an error or not."""
        with self.lock:
            self.devices = {}
            self.update(**ending(error), left_s=None)


def ending(error: BaseException | None) -> dict[str, Any]:
    """The fields of the status of a run or study that has ended by an error, or without one."""
    if error is None:
        return {"state": "finished", "exit_status": ExitStatus.OK, "message": "", "done": 1.0}
    if isinstance(error, RunStopped):
        return {"state": "stopped", "exit_status": ExitStatus.STOPPED, "message": one_line(error)}
    if isinstance(error, KeyboardInterrupt):
        return {"state": "stopped", "exit_status": ExitStatus.INTERRUPTED, "message": "interrupted"}
    status = error.exit_status if isinstance(error, GlannError) else ExitStatus.BUG
    return {"state": "failed", "exit_status": status, "message": one_line(error, 300)}


def score_of(best: Best | None) -> Measured | None:
    """What a checkpoint measured, for status.json."""
    return None if best is None else Measured(metric=best.metric, value=best.value, step=best.step)
