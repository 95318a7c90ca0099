"""How much of a study's time is gone, over all its starts, and whether that is all."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from ray import tune

from ..metrics.result import from_key, to_key
from ..reports.run_folder import JOURNAL
from ..storage.journal import entries
from ..tracking.runs import TrackedRun
from .ledger import Ledger, best_of
from .not_pickled import NotPickled
from .study import StudyConfig

TELL_EVERY_S = 30.0  # a study that is killed forgets at most so much of what it took


class Budget(NotPickled, tune.Callback):
    """A clock of hours and GPU-hours, kept in the journal of the study, where MLflow has it from too."""

    def __init__(
        self, study: StudyConfig, ledger: Ledger, tracked: TrackedRun, gpus: float, told: Callable[[], None]
    ) -> None:
        """`gpus`: of each trial that runs. `told`: called after every entry of the journal."""
        self.study, self.ledger, self.tracked, self.gpus, self.told = study, ledger, tracked, gpus, told
        before = [entry for entry in entries(study.folder / JOURNAL) if entry.get("stage") == "study"]
        self.seconds = float(before[-1]["seconds"]) if before else 0.0
        self.gpu_seconds = float(before[-1]["gpu_seconds"]) if before else 0.0
        self.entry = int(before[-1]["step"]) if before else 0
        self.seen = self.told_at = monotonic()
        self.ended = -1

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Ray Tune calls this many times a second."""
        self.count(sum(trial.status == "RUNNING" for trial in trials))

    def count(self, running: int) -> None:
        """Take the time since the last call, in which so many trials ran."""
        now = monotonic()
        self.seconds += now - self.seen
        self.gpu_seconds += (now - self.seen) * running * self.gpus
        self.seen = now
        ended = sum(trial.ended for trial in self.ledger.trials)
        if now - self.told_at >= TELL_EVERY_S or ended != self.ended:
            self.told_at, self.ended = now, ended
            self.tell(running)

    def tell(self, running: int) -> None:
        self.entry += 1
        best = best_of(self.ledger.trials, self.study.minimize)
        numbers = {"seconds": self.seconds, "gpu_seconds": self.gpu_seconds, "running": running, "ended": self.ended}
        metric, sampler = from_key(self.study.metric)
        best_value = {} if best is None else {to_key(f"best_{metric}", sampler): best.value}
        self.tracked.log_metrics({"stage": "study"} | numbers | best_value, self.entry)
        self.told()

    def spent(self) -> bool:
        return bool(self.why())

    def why(self) -> str:
        """Which part of the budget is spent; empty while none is. That all trials are done is the search's to say."""
        budget = self.study.budget
        if budget.hours is not None and self.seconds >= 3600 * budget.hours:
            return f"{budget.hours:g} hours"
        if budget.gpu_hours is not None and self.gpu_seconds >= 3600 * budget.gpu_hours:
            return f"{budget.gpu_hours:g} GPU-hours"
        return ""
