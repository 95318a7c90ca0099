"""How a study stands, for the file beside its checkpoints that `glann jobs` reads."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from ..reports.status import Status
from ..trainers.run.telemetry import ending
from .ledger import Ledger
from .study import StudyConfig


class StudyTelemetry:
    """Status of a study, by its ledger.

    Args:
        mlflow: address of its run in MLflow, or of the tracking server.
    """

    def __init__(
        self, study: StudyConfig, ledger: Ledger, mlflow: str | None, clock: Callable[[], float] = time.time
    ) -> None:
        self.study, self.ledger, self.clock = study, ledger, clock
        self.before, now = self.ended_trials(), clock()
        host = socket.gethostname()
        self.current = Status(name=study.name, state="running", host=host, began=now, updated=now, mlflow=mlflow)

    def ended_trials(self) -> int:
        return sum(trial.ended for trial in self.ledger.trials)

    def status(self) -> Status:
        """The present status: trials that have ended, the best of them, and the time left at the pace of this start."""
        now, ended, total = self.clock(), self.ended_trials(), self.study.trials_in_all
        changes = {"updated": now, "stage": f"{ended} of {total} trials", "done": min(1.0, ended / max(total, 1))}
        values = [(trial.value, trial.number) for trial in self.ledger.trials if trial.value is not None]
        if self.current.ended:
            return self.current.model_copy(update=changes)
        best = ""
        if values:
            value, number = (min if self.study.minimize else max)(values)
            best = f"best {self.study.metric} {value:.4g}, trial {number}"
        here = ended - self.before
        left_s = (now - self.current.began) / here * max(0, total - ended) if here else None
        return self.current.model_copy(update=changes | {"message": best, "left_s": left_s})

    def end(self, error: BaseException | None) -> None:
        """The study has ended, by an error or not."""
        self.current = self.current.model_copy(update=ending(error))
