"""Who goes on: Ray Tune's schedulers as a study asks for them, told again what its earlier starts have seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from ..tracking.journal import FILE as JOURNAL
from ..tracking.journal import entries
from .ledger import BASELINE, Trial
from .study import StudyConfig, trial_name

EPOCH, LOSS = "epoch", "loss"  # of stage 1, in what a trial reports; the base recipe's trial reports no loss to it
LONG = 10**9  # more epochs than anybody trains: a trial ends by itself


def build_scheduler(study: StudyConfig, trials: list[Trial]) -> TrialScheduler:
    """The scheduler of a study that has these trials behind it."""
    if study.search.kind == "population":
        return PopulationBasedTraining(
            time_attr=EPOCH,
            metric=LOSS,
            mode="min",
            perturbation_interval=study.search.interval,
            hyperparam_mutations={"params": {key: _resample(study, key) for key in study.space}},
            synch=False,
            require_attrs=False,
            log_config=False,
        )
    if not study.stops_early:
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr=EPOCH,
        metric=LOSS,
        mode="min",
        grace_period=study.scheduler.grace,
        reduction_factor=study.scheduler.reduction,
        max_t=max(study.base().glo.epochs, study.scheduler.grace),
        stop_last_trials=False,
    )
    for trial in trials:
        if trial.number != BASELINE:
            replay(asha, study, trial)
    return asha


def replay(asha: ASHAScheduler, study: StudyConfig, trial: Trial) -> None:
    """Have the rungs know a trial of an earlier start by its journal: they know trials by their id alone."""
    known: Any = SimpleNamespace(trial_id=trial_name(study.name, trial.number))
    controller: Any = None
    asha.on_trial_add(controller, known)
    for epoch, loss in losses(study.folder / "trials" / known.trial_id):
        asha.on_trial_result(controller, known, {EPOCH: epoch, LOSS: loss})


def losses(run_dir: Path) -> Iterator[tuple[int, float]]:
    """(epoch, loss) of stage 1 from a run folder's journal."""
    for entry in entries(run_dir / JOURNAL):
        if entry.get("stage") == "glo" and isinstance(entry.get(LOSS), int | float):
            yield int(entry[EPOCH]), float(entry[LOSS])


def _resample(study: StudyConfig, key: str) -> Any:
    dimension = study.space[key]
    if dimension.choice is not None:
        return list(dimension.choice)
    low, high = dimension.bounds
    return tune.loguniform(low, high) if dimension.log else tune.uniform(low, high)
