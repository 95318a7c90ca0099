"""Ray Tune's schedulers as configured by a study, with the results of its earlier starts replayed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from ..metrics.result import BASELINE as BASELINE_SAMPLER
from ..metrics.result import to_key
from ..metrics.spec import Better, best_metric
from ..reports.run_folder import JOURNAL
from ..storage.journal import entries
from ..trainers.run.measuring import entry_of
from ..trainers.stage import first_epochs, stage_infos
from .ledger import BASELINE, Trial
from .study import StudyConfig

EPOCH, LOSS = "epoch", "loss"  # of stage 1, as trials report them; the base recipe's trial reports no loss


def build_scheduler(study: StudyConfig, trials: list[Trial]) -> TrialScheduler:
    """The scheduler of a study, aware of the trials of earlier starts."""
    if study.search.kind == "population":
        return PopulationBasedTraining(
            time_attr=EPOCH,
            metric=LOSS,
            mode="min",
            perturbation_interval=study.search.interval,
            hyperparam_mutations={"member": {"params": {key: _resample(study, key) for key in study.space}}},
            custom_explore_fn=partial(within, study),
            require_attrs=False,
            log_config=False,
        )
    if not study.stops_early:
        return FIFOScheduler()
    asha = Halving(
        time_attr=EPOCH,
        metric=LOSS,
        mode="min",
        grace_period=study.scheduler.grace,
        reduction_factor=study.scheduler.reduction,
        # no rung at the last epoch: a trial that gets there is measured anyway
        max_t=max(first_epochs(study.base()) - 1, study.scheduler.grace),
        stop_last_trials=False,
    )
    for trial in trials:
        if trial.number != BASELINE:
            replay(asha, study, trial)
    return asha


class Halving(ASHAScheduler):
    """ASHA with trials identified by number: Ray's ids change with every start of a study."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, by_number(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return super().on_trial_result(tune_controller, by_number(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, by_number(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, by_number(trial))


def by_number(trial: Any) -> Any:
    """A stand-in for a Ray trial with its number as id, the only attribute that rungs read."""
    return SimpleNamespace(trial_id=trial.config["member"]["number"])


def replay(asha: Halving, study: StudyConfig, trial: Trial) -> None:
    """Feed the results in the journal of a trial of an earlier start to the rungs, also if it will be resumed."""
    known = SimpleNamespace(config={"member": {"number": trial.number}})
    asha.on_trial_add(None, known)
    for epoch, loss in compared(study, study.run_dir(trial.number)):
        asha.on_trial_result(None, known, {EPOCH: epoch, LOSS: loss})


def first_stage(study: StudyConfig) -> str:
    """Name of the stage whose losses the scheduler compares."""
    return next(iter(stage_infos(study.base())))


def compared(study: StudyConfig, run_dir: Path) -> Iterator[tuple[int, float]]:
    """Pairs (epoch, number) of stage 1 that trials are compared by, read from the journal of a run folder."""
    if study.scheduler.by == LOSS:
        yield from losses(run_dir, first_stage(study))
        return
    base = study.base().evaluation
    metric, measured = best_metric(base.extractor, base.best), entry_of(first_stage(study))
    for entry in entries(run_dir / JOURNAL):
        value = entry.get(to_key(metric.name, BASELINE_SAMPLER))
        if entry.get("stage") == measured and isinstance(value, int | float):
            yield int(entry[EPOCH]), lower_is_better(float(value), metric.better)


def last_score(study: StudyConfig, run_dir: Path) -> str:
    """The score that a trial was last compared by, in words; empty without one."""
    base = study.base().evaluation
    metric = best_metric(base.extractor, base.best)
    reached = [*compared(study, run_dir)][-1:]
    name = to_key(metric.name, BASELINE_SAMPLER)
    return "".join(
        f"after epoch {epoch}, {name} {lower_is_better(number, metric.better):.4g}" for epoch, number in reached
    )


def lower_is_better(value: float, better: Better) -> float:
    """A score as schedulers take it."""
    return value if better == "lower" else -value


def losses(run_dir: Path, stage: str) -> Iterator[tuple[int, float]]:
    """Pairs (epoch, loss) of a stage, read from the journal of a run folder."""
    for entry in entries(run_dir / JOURNAL):
        if entry.get("stage") == stage and isinstance(entry.get(LOSS), int | float):
            yield int(entry[EPOCH]), float(entry[LOSS])


def within(study: StudyConfig, config: dict[str, Any]) -> dict[str, Any]:
    """Clamp a member's perturbed values to the space: Ray Tune changes them by 20 % without bounds."""
    params = config["member"]["params"]
    for key, dimension in study.space.items():
        if key in params and dimension.choice is None:
            low, high = dimension.bounds
            params[key] = min(max(params[key], low), high)
    return config


def _resample(study: StudyConfig, key: str) -> Any:
    dimension = study.space[key]
    if dimension.choice is not None:
        return list(dimension.choice)
    low, high = dimension.bounds
    return tune.loguniform(low, high) if dimension.log else tune.uniform(low, high)
