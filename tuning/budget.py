"""Time budget of a study, counted over all its starts."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from ray import tune

from ..metrics.result import from_key, to_key
from ..reports.run_folder import JOURNAL
from ..storage.journal import entries
from ..tracking.runs import TrackedRun
from .ledger import Ledger, best_of
from .not_pickled import NotPickled
from .study import StudyConfig

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as RayTrial

RECORD_EVERY_S = 30.0  # upper bound on the time that is not counted when a study is killed


class Budget(NotPickled, tune.Callback):
    """Counter of hours and GPU-hours, recorded in the journal of the study and from there in MLflow."""

    def __init__(
        self, study: StudyConfig, ledger: Ledger, tracked: TrackedRun, gpus: float, notify: Callable[[], None]
    ) -> None:
        """`gpus`: GPUs of each running trial. `notify`: called after every entry of the journal."""
        self.study, self.ledger, self.tracked, self.gpus, self.notify = study, ledger, tracked, gpus, notify
        before = [entry for entry in entries(study.folder / JOURNAL) if entry.get("stage") == "study"]
        self.seconds = float(before[-1]["seconds"]) if before else 0.0
        self.gpu_seconds = float(before[-1]["gpu_seconds"]) if before else 0.0
        self.entry = int(before[-1]["step"]) if before else 0
        self.seen = self.recorded_at = monotonic()
        self.ended = -1

    def on_step_begin(self, iteration: int, trials: list[RayTrial], **info: object) -> None:
        """Count the time; Ray Tune calls this many times a second."""
        self.count(sum(trial.status == "RUNNING" for trial in trials))

    def count(self, running: int) -> None:
        """Add the time since the last call, during which `running` trials ran."""
        now = monotonic()
        self.seconds += now - self.seen
        self.gpu_seconds += (now - self.seen) * running * self.gpus
        self.seen = now
        ended = sum(trial.ended for trial in self.ledger.trials)
        if now - self.recorded_at >= RECORD_EVERY_S or ended != self.ended:
            self.recorded_at, self.ended = now, ended
            self.record(running)

    def record(self, running: int) -> None:
        """Append the totals and the best value so far to the journal."""
        self.entry += 1
        best = best_of(self.ledger.trials, self.study.minimize)
        numbers = {"seconds": self.seconds, "gpu_seconds": self.gpu_seconds, "running": running, "ended": self.ended}
        metric, *others = from_key(self.study.metric)
        best_value = {} if best is None else {to_key(f"best_{metric}", *others): best.value}
        self.tracked.log_metrics({"stage": "study"} | numbers | best_value, self.entry)
        self.notify()

    def spent(self) -> bool:
        return bool(self.why())

    def why(self) -> str:
        """The limit that was reached; empty if none was. The number of trials is the concern of the search."""
        budget = self.study.budget
        if budget.hours is not None and self.seconds >= 3600 * budget.hours:
            return f"{budget.hours:g} hours"
        if budget.gpu_hours is not None and self.gpu_seconds >= 3600 * budget.gpu_hours:
            return f"{budget.gpu_hours:g} GPU-hours"
        return ""
