"""One trial: the same training as `glann train`, in a Ray Tune trainable that tells how far it is.

Ray Tune asks for a result again and again. It gets one for every epoch of stage 1, by which trials are compared, and
between them a sign of life; the run itself goes on in a thread, and waits at an epoch until it is known to go on.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from ray import tune

from ..config.run import Config
from ..errors import GlannError, one_line, redact
from ..reports.run_folder import RAY
from ..storage.files import write_whole
from ..trainers.run.events import EpochDone, Event, Progress
from ..trainers.run.hooks import Hooks
from ..trainers.run.preflight import is_worked_on
from ..trainers.run.recovery import RunStopped
from .ledger import BASELINE
from .population import clone_run, newest_step
from .scheduler import EPOCH, LOSS, first_stage, losses
from .study import StudyConfig, trial_name

if TYPE_CHECKING:
    from rich.console import Console

HEARTBEAT_S = 1.0
STOP_PATIENCE_S = 540.0  # to save and stop; Ray Tune kills after 600 s
DONOR = "run.json"  # what a population hands from trial to trial: which run to go on from

Metrics = dict[str, float]
# A way to train and measure a run: by both stages, or by the second one alone.
Work = Callable[[Config, "Console", Hooks], Metrics]


@dataclass(frozen=True)
class Part:
    """What every trial of a study is told.

    home: the working folder of the command, on whose node all trials live. tracking_uri: with its password, so it must
    not be part of what Ray shows. work: how a run is trained and measured.
    """

    study: StudyConfig
    home: Path
    tracking_uri: str | None
    parent_run_id: str | None
    work: Work

    def config(self, number: int, params: dict[str, Any]) -> Config:
        """The run of a trial, with a place for everything, wherever its process runs."""
        config = self.study.trial(number, params).with_absolute_paths()
        tracking = config.tracking.model_copy(update={"uri": self.tracking_uri, "register_as": None})
        return config.model_copy(update={"tracking": tracking})


class TrialRun(tune.Trainable):
    """A trial as Ray Tune knows it; it lives on the study's node, its workers anywhere."""

    def setup(self, config: dict[str, Any], **given: Part) -> None:
        part = given["part"]
        os.chdir(part.home)  # paths in the recipe mean what they mean to the command
        self.part, self.number = part, own_number(part.study, self.trial_id, config["member"]["number"])
        self.first_stage = first_stage(part.study)
        self.params = {} if self.number == BASELINE else dict(config["member"]["params"])
        self.donor: tuple[Path, int | None] | None = None
        self.reports: Queue[dict[str, Any]] = Queue()
        self.unanswered, self.goes_on = False, threading.Event()
        self.ended, self.stopping = threading.Event(), threading.Event()
        self.reached: dict[str, Any] = {"stage": "starting", "reached_epoch": 0}
        self.last: dict[str, Any] = {}
        self.thread: threading.Thread | None = None

    def step(self) -> dict[str, Any]:
        """The next epoch's result; where there is none for a while, how far the run is; at last how it ended."""
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, name="trial", daemon=True)
            self.thread.start()
        if self.unanswered:  # being asked again means that the last report did not end the trial
            self.unanswered = False
            self.goes_on.set()
        try:
            report = self.reports.get(timeout=HEARTBEAT_S)
            self.unanswered = True
        except Empty:
            done = self.ended.is_set() and self.reports.empty()
            report = {"done": True, **self.last} if done else {}
        return {"number": self.number, "params": self.params, **self.reached, **report}

    def cleanup(self) -> None:
        """Save and stop whatever still runs, so that workers, table, lock and MLflow's run are let go of in order."""
        self.stopping.set()
        if self.thread is not None:
            self.thread.join(STOP_PATIENCE_S)

    # A population -----------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Not the run's state, which has checkpoints of its own: only which run this is."""
        config = self.part.config(self.number, {})
        told = {"run": str(config.run_dir), "number": self.number, "step": newest_step(config)}
        write_whole(Path(checkpoint_dir) / DONOR, json.dumps(told))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """`checkpoint`: the folder that the other was told to save to."""
        told = json.loads((Path(checkpoint) / DONOR).read_text())
        if told["number"] != self.number:
            self.donor = Path(told["run"]), told["step"]

    # The thread -------------------------------------------------------------------------------

    def run(self) -> None:
        study, name = self.part.study, trial_name(self.part.study.name, self.number)
        log = study.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8", buffering=1) as file:
            try:
                self.last = {"metrics": self.trained(file)}
            except RunStopped as stopped:
                file.write(f"{stopped}\n")
                self.last = {"interrupted": True}
            except Exception as error:
                file.write(redact(traceback.format_exc()))
                self.last = {"why": reason(error)}
        self.ended.set()

    def trained(self, file: Any) -> Metrics:
        from rich.console import Console

        study = self.part.study
        config = self.part.config(self.number, self.params)
        began = monotonic()
        while is_worked_on(config.run_dir) and monotonic() - began < STOP_PATIENCE_S:
            sleep(0.2)  # what this trial was a moment ago is still saving
        if self.donor is not None:
            clone_run(self.donor[0], config, self.donor[1])
        for epoch, loss in losses(config.run_dir, self.first_stage):  # how far earlier starts have come
            self.reached |= {"reached_epoch": epoch, "reached_loss": loss}
        tags = {"glann.study": study.name, "glann.trial": str(self.number)}
        hooks = Hooks(self.part.parent_run_id, tags, self.notify, self.stop_wanted)
        return self.part.work(config, Console(file=file, width=120), hooks)

    def stop_wanted(self) -> str:
        return "the study ended this trial" if self.stopping.is_set() else ""

    def notify(self, event: Event) -> None:
        """Report epochs of stage 1, and remember how far the run is."""
        if not isinstance(event, Progress | EpochDone):
            return
        numbers = event.speed if isinstance(event, Progress) else event.numbers
        rate = {"images_per_s": numbers["images_per_s"]} if "images_per_s" in numbers else {}
        self.reached |= {"stage": event.stage, "stage_epoch": event.epoch} | rate
        if isinstance(event, EpochDone) and event.stage == self.first_stage:
            self.reached |= {"reached_epoch": event.epoch, "reached_loss": event.numbers["loss"]}
            # the base recipe is there to be compared with: it gives no loss by which it could be stopped early
            self.report({EPOCH: event.epoch, LOSS: event.numbers["loss"]} if self.number != BASELINE else {})

    def report(self, result: dict[str, Any]) -> None:
        """Hand a result to Ray Tune, and wait until it asks for the next one: until then it may end the trial."""
        self.goes_on.clear()
        self.reports.put(result)
        while not self.goes_on.wait(0.1) and not self.stopping.is_set():
            pass


def own_number(study: StudyConfig, trial_id: str, given: int) -> int:
    """The number that Ray's trial began with: who goes on from another's copy is given all of the other's values."""
    path = study.folder / RAY / f"{trial_id}.number"
    if not path.exists():
        write_whole(path, str(given))
    return int(path.read_text(encoding="utf-8"))


def reason(error: Exception) -> str:
    """Why a trial failed, in one line."""
    text = one_line(error, 500)
    return text if isinstance(error, GlannError) else f"{type(error).__name__}: {text}"
