"""The values of the next trial as a function of the ledger alone, and its adapter for Ray Tune.

A search has no other state, so an interrupted study continues exactly as if it had not been interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import tune
from ray.tune.search import Searcher
from ray.tune.utils import flatten_dict

from ..storage.open import open_store
from ..trainers.run.preflight import is_worked_on
from .ledger import BASELINE, Ledger, Trial
from .not_pickled import NotPickled
from .space import Dimension, Params, dependencies_first, grid
from .study import StudyConfig

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial
    from ray.tune.experiment import Trial as RayTrial


def suggest(study: StudyConfig, trials: Iterable[Trial]) -> Params | None:
    """Values of the trial after the given ones; None at the end of a grid.

    The first trial is the base recipe. Running trials count too, so that parallel ones differ.
    """
    trials = list(trials)
    if not trials:
        return {}
    if study.search.kind == "grid":
        return next(islice(grid(study.space), len(trials) - 1, None), None)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    past = optuna.create_study(
        direction="minimize" if study.minimize else "maximize", sampler=_sampler(study, len(trials))
    )
    for trial in trials:
        if trial.number != BASELINE:
            past.add_trial(_frozen(study, trial))
    optuna_trial, params = past.ask(), Params()
    for key in dependencies_first(study.space):
        dimension = study.space[key]
        if dimension.holds(params):
            params[key] = dimension.decode(_sample(optuna_trial, key, dimension))
    return params


def _sample(trial: OptunaTrial, key: str, dimension: Dimension) -> int | float:
    """A value from Optuna's sampler, in its encoding."""
    if dimension.choice is not None:
        return trial.suggest_categorical(key, range(len(dimension.choice)))
    low, high = dimension.bounds
    if dimension.kind.endswith("integer"):
        return trial.suggest_int(key, int(low), int(high), log=dimension.log)
    return trial.suggest_float(key, low, high, log=dimension.log)


def _sampler(study: StudyConfig, number: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler

    seed = int(np.random.SeedSequence((study.search.seed, number)).generate_state(1)[0])
    if study.search.kind == "tpe":
        return TPESampler(seed=seed, n_startup_trials=study.search.startup, constant_liar=True)
    return RandomSampler(seed=seed)


def _frozen(study: StudyConfig, trial: Trial) -> FrozenTrial:
    """A trial in Optuna's form; one that was stopped early is ranked by its last epoch and loss."""
    from optuna.trial import TrialState, create_trial

    state = {
        "running": TrialState.RUNNING,
        "finished": TrialState.COMPLETE if trial.value is not None else TrialState.FAIL,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }[trial.state]
    inside = {key: study.space[key].encode(value) for key, value in trial.params.items() if key in study.space}
    known = {key: value for key, value in inside.items() if value is not None}  # the space may have been narrowed
    loss = None if trial.loss is None else (trial.loss if study.minimize else -trial.loss)
    return create_trial(
        state=state,
        value=trial.value if state is TrialState.COMPLETE else None,
        params=known,
        distributions={key: study.space[key].distribution() for key in known},
        intermediate_values={} if loss is None else {trial.epoch: loss},
    )


class LedgerSearch(NotPickled, Searcher):
    """Searcher for Ray Tune: resumes interrupted trials first, then starts new ones, up to the budget.

    Args:
        slots: number of trials that the cluster has capacity for now.
        over: whether the study is ending; a trial that ends then counts as interrupted.
    """

    def __init__(self, study: StudyConfig, ledger: Ledger, slots: Callable[[], int], over: Callable[[], bool]) -> None:
        super().__init__(metric=study.metric, mode="min" if study.minimize else "max")
        self.study, self.ledger, self.slots, self.over = study, ledger, slots, over
        self.waiting = [trial for trial in ledger.trials if not trial.ended]
        self.running: dict[str, Trial] = {}  # by Ray's id
        self.began: dict[str, float] = {}
        # Ended for Ray, but possibly still holding the lock of their run folders. Includes stopped trials of earlier
        # starts, whose checkpoints may not have been removed.
        self.closing: list[Trial] = [trial for trial in ledger.trials if trial.state == "stopped"]

    def suggest(self, trial_id: str) -> Any:
        """Values for a new trial; None if there is no capacity yet, FINISHED if there are no more trials."""
        self.settle()
        if self.over():
            return None if self.closing or self.running else Searcher.FINISHED
        if len(self.running) + len(self.closing) >= self.slots():
            return None
        trial = self.waiting.pop(0) if self.waiting else self.next_trial()
        if trial is None:
            return None if self.closing or self.running else Searcher.FINISHED
        self.mark_running(trial_id, trial)
        return {"member": member(trial)}

    def mark_running(self, trial_id: str, trial: Trial) -> None:
        """Record that Ray runs a trial under this id."""
        self.running[trial_id], self.began[trial_id] = trial, monotonic()

    def population(self) -> list[Trial]:
        """All trials of a population, appended to the ledger: they all start at the beginning."""
        while (trial := self.next_trial()) is not None:
            self.waiting.append(trial)
        return self.waiting

    def next_trial(self) -> Trial | None:
        """A new trial, appended to the ledger before it starts; None if there are no more."""
        trials = self.ledger.trials
        if len(trials) >= self.study.budget.trials:
            return None
        params = suggest(self.study, trials)
        return None if params is None else self.ledger.start(params)

    def settle(self) -> None:
        """Forget ended trials whose processes have exited, and remove the checkpoints of those stopped early."""
        for trial in self.closing[:]:
            if not is_worked_on(self.study.run_dir(trial.number)):
                self.closing.remove(trial)
                if trial.state == "stopped":
                    drop_checkpoints(self.study, trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignored: the scheduler handles intermediate results, the search only final ones."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.running.pop(trial_id, None)
        if trial is None:
            return
        seconds = monotonic() - self.began.pop(trial_id)
        if (ended := outcome(self.study, result, error, self.over())) is not None:
            self.closing.append(self.ledger.end(trial, seconds, **ended))
        else:
            self.closing.append(self.ledger.interrupt(trial, seconds))
            self.waiting.append(self.closing[-1])

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is the only state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: Ray Tune's own resume is not used."""


class Members(NotPickled, tune.Callback):
    """Callback that records the trials of a population in the ledger: Ray Tune starts them without a searcher."""

    def __init__(self, search: LedgerSearch) -> None:
        self.search = search
        self.waiting = {trial.number: trial for trial in search.waiting}

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: object) -> None:
        if (known := self.waiting.pop(trial.config["member"]["number"], None)) is not None:
            self.search.mark_running(trial.trial_id, known)

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: object) -> None:
        self.search.on_trial_complete(trial.trial_id, flatten_dict(trial.last_result))

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: object) -> None:
        self.search.on_trial_complete(trial.trial_id, error=True)


def member(trial: Trial) -> dict[str, Any]:
    """The configuration of a trial for Ray Tune."""
    return {"number": trial.number, "params": trial.params}


def outcome(study: StudyConfig, result: dict[str, Any] | None, error: bool, over: bool) -> dict[str, Any] | None:
    """Ledger fields for the last result of a trial; None if it was interrupted and will be resumed.

    Args:
        result: flattened by Ray Tune. error: the process of the trial was lost. over: the study was ending by then.
    """
    if error:
        return None if over else {"state": "failed", "why": "its process was lost"}
    if result is None or result.get("interrupted"):
        return None
    facts: dict[str, Any] = {
        "params": _nested(result, "params"),
        "epoch": int(result.get("reached_epoch", 0)),
        "loss": result.get("reached_loss"),
    }
    if result.get("why"):
        return facts | {"state": "failed", "why": str(result["why"])}
    metrics = _nested(result, "metrics")
    if not metrics:
        return None if over else facts | {"state": "stopped"}
    if not math.isfinite(metrics.get(study.metric, math.nan)):
        return facts | {"state": "failed", "metrics": metrics, "why": f"it has no finite {study.metric}"}
    return facts | {"state": "finished", "value": metrics[study.metric], "metrics": metrics}


def _nested(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The dictionary under `name` before Ray Tune flattened the result."""
    return {key.removeprefix(f"{name}/"): value for key, value in result.items() if key.startswith(f"{name}/")}


def drop_checkpoints(study: StudyConfig, trial: Trial) -> None:
    """Remove the checkpoints of a trial that will not be resumed; its journal and pictures stay."""
    config = study.trial(trial.number, trial.params)
    store = open_store(config.checkpoint_url, config.s3)
    for key in store.list():
        store.delete(key)


def first_trials(study: StudyConfig, count: int) -> list[Trial]:
    """The first `count` trials of a study, which must not depend on results: for `--dry-run`."""
    trials: list[Trial] = []
    while len(trials) < min(count, study.budget.trials):
        params = suggest(study, trials)
        if params is None:
            break
        trials.append(Trial(len(trials), params))
    return trials
