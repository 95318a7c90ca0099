"""Forecast of a study for `glann tune --dry-run`: its first trials and its cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..trainers.plan.estimate import Estimate, make_plan
from ..trainers.stage import first_epochs
from .ledger import Trial, format_params, trials
from .search import first_trials
from .study import StudyConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 20  # maximum number of trials listed


@dataclass(frozen=True)
class Forecast:
    """The trials that are known beforehand, and the hours of device time by kind of device.

    total: trials of the whole study. begun: trials started before. whole: trials still to run that train both stages
    to the end. share: expected share of the training that each of the others completes.
    """

    study: StudyConfig
    total: int
    begun: int
    planned: list[Trial]
    estimates: tuple[Estimate, ...]
    whole: int
    share: float

    @property
    def left(self) -> int:
        """Number of trials still to be started."""
        return max(0, self.total - self.begun)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for column in ("trial", "values"):
            table.add_column(column)
        for trial in self.planned:
            table.add_row(str(trial.number), Text(format_params(trial.params)))
        return Group(
            Text(f"study {self.study.name}: {self.left} trials to start, {self.begun} begun; nothing was started"),
            table,
            *(Text(line) for line in self.notes()),
        )

    def notes(self) -> list[str]:
        more = self.left - len(self.planned)
        later = "depend on the results of these" if self.study.search.kind == "tpe" else "follow"
        notes = [f"... and {more} more, which {later}"] if more > 0 else []
        for estimate in self.estimates:
            hours = estimate.device_hours * (self.whole + self.share * (self.left - self.whole))
            kind = "core" if estimate.device == "CPU" else "GPU"
            notes.append(f"{estimate.device}: about {hours:.3g} {kind}-hours of training ({estimate.basis})")
        if self.study.second_stage_only:
            notes.append("all trials share one stage 1")
        elif self.share < 1:
            notes.append(
                f"of the epochs of stage 1, about {self.share:.0%} will run: the worse trials are stopped early"
            )
        return notes


def forecast(study: StudyConfig) -> Forecast:
    """The forecast of a study, begun or not.

    Raises:
        UserError: the data set exists but does not fit the recipe.
    """
    study = study.with_absolute_paths()
    begun = len(trials(study.folder))
    plan = make_plan(study.base())
    first, *later = (cost.flops for cost in plan.costs.values())
    share = sum(later) / (first + sum(later)) if study.second_stage_only else expected(study)
    whole = 0 if begun or study.stage_one else 1  # the base recipe is never stopped early
    # not counting the base recipe; later trials depend on results
    known = study.search.startup if study.search.kind == "tpe" else study.budget.trials
    planned = first_trials(study, min(1 + known, SHOWN)) if begun == 0 else []
    return Forecast(study, study.trials_in_all, begun, planned, plan.estimates, whole, share)


def expected(study: StudyConfig) -> float:
    """Expected share of the epochs under successive halving: 1/reduction of the trials pass each rung."""
    if not study.stops_early:
        return 1.0
    epochs, grace, reduction = first_epochs(study.base()), study.scheduler.grace, study.scheduler.reduction
    if epochs <= grace:
        return 1.0
    rungs = [grace * reduction**k for k in range(int(math.log(epochs / grace, reduction)) + 1)]
    ends = [*rungs[1:], float(epochs)]
    spent = float(grace)
    for k, (rung, end) in enumerate(zip(rungs, ends, strict=True), start=1):
        spent += (end - rung) / reduction**k
    return min(1.0, spent / epochs)
