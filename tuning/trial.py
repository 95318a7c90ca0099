"""One trial: the training of `glann train` inside a Ray Tune trainable that reports its progress.

Ray Tune calls `step` repeatedly. It returns a result for every epoch of stage 1, by which trials are compared, and a
heartbeat in between. The run itself is in a thread, which waits after each epoch until Ray Tune has decided on it.
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
from typing import TYPE_CHECKING, Any, TextIO

from ray import tune

from ..config.run import Config
from ..errors import redact
from ..reports.run_folder import RAY
from ..storage.files import write_whole
from ..trainers.run.events import EpochDone, Event, Measured, Progress
from ..trainers.run.hooks import Hooks
from ..trainers.run.preflight import is_worked_on
from ..trainers.run.recovery import RunStopped
from .ledger import BASELINE, reason
from .population import clone_run, newest_step
from .scheduler import EPOCH, LOSS, first_stage, losses, lower_is_better
from .study import StudyConfig, trial_name

if TYPE_CHECKING:
    from rich.console import Console

HEARTBEAT_S = 1.0
STOP_PATIENCE_S = 540.0  # for saving and stopping; Ray Tune kills the process after 600 s
DONOR = "run.json"  # names the run that a member of a population continues from

Metrics = dict[str, float]
# Trains and measures a run: both stages, or the second one alone.
TrainAndMeasure = Callable[[Config, "Console", Hooks], Metrics]


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a study share.

    home: working folder of the command; all trials run on its node. tracking_uri: includes its password, so it must
    not appear in Ray's dashboard. train: trains and measures a run.
    """

    study: StudyConfig
    home: Path
    tracking_uri: str | None
    parent_run_id: str | None
    train: TrainAndMeasure

    def config(self, number: int, params: dict[str, Any]) -> Config:
        """Configuration of a trial's run, with absolute paths."""
        config = self.study.trial(number, params).with_absolute_paths()
        tracking = config.tracking.model_copy(update={"uri": self.tracking_uri, "register_as": None})
        return config.model_copy(update={"tracking": tracking})


class TrialRun(tune.Trainable):
    """Ray Tune trainable of a trial. It runs on the study's node, its workers anywhere in the cluster."""

    def setup(self, config: dict[str, Any], **shared: TrialContext) -> None:
        context = shared["context"]
        os.chdir(context.home)  # relative paths in the recipe resolve as in the command
        self.context, self.number = context, own_number(context.study, self.trial_id, config["member"]["number"])
        self.first_stage = first_stage(context.study)
        self.by_score = context.study.stops_early and context.study.scheduler.by == "score"
        self.params = {} if self.number == BASELINE else dict(config["member"]["params"])
        self.donor: tuple[Path, int | None] | None = None
        self.reports: Queue[dict[str, Any]] = Queue()
        self.awaiting_decision, self.resumed = False, threading.Event()
        self.ended, self.stopping = threading.Event(), threading.Event()
        self.reached: dict[str, Any] = {"stage": "starting", "reached_epoch": 0}
        self.last: dict[str, Any] = {}
        self.thread: threading.Thread | None = None

    def step(self) -> dict[str, Any]:
        """The result of the next epoch, a heartbeat after `HEARTBEAT_S` without one, or the final result."""
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, name="trial", daemon=True)
            self.thread.start()
        if self.awaiting_decision:  # another call means that the last report did not end the trial
            self.awaiting_decision = False
            self.resumed.set()
        try:
            report = self.reports.get(timeout=HEARTBEAT_S)
            self.awaiting_decision = True
        except Empty:
            done = self.ended.is_set() and self.reports.empty()
            report = {"done": True, **self.last} if done else {}
        return {"number": self.number, "params": self.params, **self.reached, **report}

    def cleanup(self) -> None:
        """Save and stop an active run, so that workers, table, lock and MLflow run are released in order."""
        self.stopping.set()
        if self.thread is not None:
            self.thread.join(STOP_PATIENCE_S)

    # Population -------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write a reference to this run and its newest checkpoint; its state is in the run's own checkpoints."""
        config = self.context.config(self.number, {})
        reference = {"run": str(config.run_dir), "number": self.number, "step": newest_step(config)}
        write_whole(Path(checkpoint_dir) / DONOR, json.dumps(reference))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Read the reference to the donor. `checkpoint`: the folder that the donor saved to."""
        reference = json.loads((Path(checkpoint) / DONOR).read_text())
        if reference["number"] != self.number:
            self.donor = Path(reference["run"]), reference["step"]

    # The thread -------------------------------------------------------------------------------

    def run(self) -> None:
        """Train and measure the run; the outcome is left in `last`."""
        study, name = self.context.study, trial_name(self.context.study.name, self.number)
        log = study.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8", buffering=1) as file:
            try:
                self.last = {"metrics": self.train_and_measure(file)}
            except RunStopped as stopped:
                file.write(f"{stopped}\n")
                self.last = {"interrupted": True}
            except Exception as error:
                file.write(redact(traceback.format_exc()))
                self.last = {"why": reason(error)}
        self.ended.set()

    def train_and_measure(self, file: TextIO) -> Metrics:
        """Train and measure the run, resuming where it stopped; console output goes to `file`."""
        from rich.console import Console

        study = self.context.study
        config = self.context.config(self.number, self.params)
        began = monotonic()
        while is_worked_on(config.run_dir) and monotonic() - began < STOP_PATIENCE_S:
            sleep(0.2)  # its previous process may still be saving
        if self.donor is not None:
            clone_run(self.donor[0], config, self.donor[1])
        for epoch, loss in losses(config.run_dir, self.first_stage):  # progress of earlier starts
            self.reached |= {"reached_epoch": epoch, "reached_loss": loss}
        tags = {"glann.study": study.name, "glann.trial": str(self.number)}
        hooks = Hooks(self.context.parent_run_id, tags, self.notify, self.stop_reason)
        return self.context.train(config, Console(file=file, width=120), hooks)

    def stop_reason(self) -> str:
        return "the study ended this trial" if self.stopping.is_set() else ""

    def notify(self, event: Event) -> None:
        """Report epochs of stage 1, or what they measured, to Ray Tune, and record the progress of the run."""
        if isinstance(event, Measured):
            self.on_measured(event)
        if not isinstance(event, Progress | EpochDone):
            return
        numbers = event.speed if isinstance(event, Progress) else event.numbers
        rate = {"images_per_s": numbers["images_per_s"]} if "images_per_s" in numbers else {}
        self.reached |= {"stage": event.stage, "stage_epoch": event.epoch} | rate
        if isinstance(event, EpochDone) and event.stage == self.first_stage:
            self.reached |= {"reached_epoch": event.epoch, "reached_loss": event.numbers["loss"]}
            if not self.by_score:
                self.compare(event.epoch, event.numbers["loss"])

    def on_measured(self, event: Measured) -> None:
        if self.by_score and event.stage == self.first_stage and event.found is not None:
            self.compare(event.epoch, lower_is_better(event.found.value, event.found.better))

    def compare(self, epoch: int, number: float) -> None:
        """Report what trials are compared by; the base recipe is the reference and is never stopped early."""
        self.report({EPOCH: epoch, LOSS: number} if self.number != BASELINE else {})

    def report(self, result: dict[str, Any]) -> None:
        """Pass a result to Ray Tune, and wait until it has decided whether the trial continues."""
        self.resumed.clear()
        self.reports.put(result)
        while not self.resumed.wait(0.1) and not self.stopping.is_set():
            pass


def own_number(study: StudyConfig, trial_id: str, given: int) -> int:
    """The number that this Ray trial started with: a member that copies another receives all of its configuration."""
    path = study.folder / RAY / f"{trial_id}.number"
    if not path.exists():
        write_whole(path, str(given))
    return int(path.read_text(encoding="utf-8"))
