"""The values of the next trial, as a function of the ledger alone; and Ray Tune's view of it.

Nothing of a search is kept anywhere else, so an interrupted study searches on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.search import Searcher

from .ledger import BASELINE, Ledger, Trial
from .space import Dimension, Params, dependencies_first, grid
from .study import StudyConfig

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial


def suggest(study: StudyConfig, trials: Iterable[Trial]) -> Params | None:
    """The values of the trial that comes after these; None where a grid has no more.

    The first is the base recipe itself. Trials that still run count too, so that parallel ones differ.
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
    asked, params = past.ask(), Params()
    for key in dependencies_first(study.space):
        dimension = study.space[key]
        if dimension.holds(params):
            params[key] = dimension.decode(_ask(asked, key, dimension))
    return params


def _ask(trial: OptunaTrial, key: str, dimension: Dimension) -> int | float:
    """The sampler's value, as Optuna holds it."""
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
    """A trial as Optuna's samplers want it: one that was stopped early counts by how far it came and its last loss."""
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


class LedgerSearch(Searcher):
    """Hands out trials to Ray Tune: first those that were interrupted, then new ones, up to the budget."""

    def __init__(self, study: StudyConfig, ledger: Ledger) -> None:
        super().__init__(metric=study.metric, mode="min" if study.minimize else "max")
        self.study, self.ledger = study, ledger
        self.waiting = [trial for trial in ledger.trials if not trial.ended]
        self.given: dict[str, Trial] = {}  # by Ray's id
        self.began: dict[str, float] = {}
        self.stopping = False  # what ends now was interrupted

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.stopping:
            return Searcher.FINISHED
        trial = self.waiting.pop(0) if self.waiting else self.next_one()
        if trial is None:
            return Searcher.FINISHED
        self.given[trial_id], self.began[trial_id] = trial, monotonic()
        return {"number": trial.number, "params": trial.params}

    def next_one(self) -> Trial | None:
        """A new trial, entered in the ledger before it is handed out."""
        trials = self.ledger.trials
        if len(trials) >= self.study.budget.trials:
            return None
        params = suggest(self.study, trials)
        return None if params is None else self.ledger.start(params)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """What a trial says on its way is the scheduler's; a search learns from its end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.given.pop(trial_id, None)
        seconds = monotonic() - self.began.pop(trial_id, monotonic())
        ended = outcome(self.study, result, error)
        if trial is not None and not self.stopping and ended is not None:
            self.ledger.end(trial, seconds, **ended)

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune keeps nothing of it: the ledger does."""

    def restore(self, checkpoint_path: str) -> None:
        """Never asked for."""


def outcome(study: StudyConfig, result: dict[str, Any] | None, error: bool) -> dict[str, Any] | None:
    """What a trial's last word means for the ledger; None if it was interrupted and is to go on."""
    if error:
        return {"state": "failed", "why": "its process was lost"}
    if result is None:
        return None
    reached = {"epoch": int(result.get("epoch", 0)), "loss": result.get("loss")}
    if result.get("why"):
        return reached | {"state": "failed", "why": str(result["why"])}
    if result.get("interrupted"):
        return None
    metrics = result.get("metrics")
    if not metrics:
        return reached | {"state": "stopped"}
    if study.metric not in metrics:
        return reached | {"state": "failed", "metrics": metrics, "why": f"it was not measured by {study.metric}"}
    return reached | {"state": "finished", "value": metrics[study.metric], "metrics": metrics}


def first_trials(study: StudyConfig, count: int) -> list[Trial]:
    """The trials that a study begins with, as far as they do not depend on results: for `--dry-run`."""
    trials: list[Trial] = []
    while len(trials) < min(count, study.budget.trials):
        params = suggest(study, trials)
        if params is None:
            break
        trials.append(Trial(len(trials), params))
    return trials


