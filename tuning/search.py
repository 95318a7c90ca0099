"""The values of the next trial, as a function of the ledger alone; and Ray Tune's view of it.

Nothing of a search is kept anywhere else, so an interrupted study searches on as if it had never stopped.
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


class LedgerSearch(NotPickled, Searcher):
    """Hands out trials to Ray Tune: first those that were interrupted, then new ones, up to the budget.

    Args:
        slots: how many trials there is capacity for now.
        over: whether the study is to end; what ends then was interrupted.
    """

    def __init__(self, study: StudyConfig, ledger: Ledger, slots: Callable[[], int], over: Callable[[], bool]) -> None:
        super().__init__(metric=study.metric, mode="min" if study.minimize else "max")
        self.study, self.ledger, self.slots, self.over = study, ledger, slots, over
        self.waiting = [trial for trial in ledger.trials if not trial.ended]
        self.running: dict[str, Trial] = {}  # by Ray's id
        self.began: dict[str, float] = {}
        # Ended for Ray, and not let go of their run folders yet; those that an earlier start did not come to, too.
        self.closing: list[Trial] = [trial for trial in ledger.trials if trial.state == "stopped"]

    def suggest(self, trial_id: str) -> Any:
        """Values for a new trial; None: ask again later; FINISHED: there are no more."""
        self.settle()
        if self.over():
            return None if self.closing or self.running else Searcher.FINISHED
        if len(self.running) + len(self.closing) >= self.slots():
            return None
        trial = self.waiting.pop(0) if self.waiting else self.next_one()
        if trial is None:
            return None if self.closing or self.running else Searcher.FINISHED
        self.hand_out(trial_id, trial)
        return {"member": member(trial)}

    def hand_out(self, trial_id: str, trial: Trial) -> None:
        """Note that Ray runs a trial under this id."""
        self.running[trial_id], self.began[trial_id] = trial, monotonic()

    def population(self) -> list[Trial]:
        """All that is to run, entered in the ledger: a population is there from the beginning."""
        while (trial := self.next_one()) is not None:
            self.waiting.append(trial)
        return self.waiting

    def next_one(self) -> Trial | None:
        """A new trial, entered in the ledger before it is handed out."""
        trials = self.ledger.trials
        if len(trials) >= self.study.budget.trials:
            return None
        params = suggest(self.study, trials)
        return None if params is None else self.ledger.start(params)

    def settle(self) -> None:
        """Let go of trials whose processes are gone, and of the checkpoints of those that will not go on."""
        for trial in self.closing[:]:
            if not is_worked_on(self.study.run_dir(trial.number)):
                self.closing.remove(trial)
                if trial.state == "stopped":
                    drop_checkpoints(self.study, trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """What a trial says on its way is the scheduler's; a search learns from its end."""

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
        """Ray Tune keeps nothing of it: the ledger does."""

    def restore(self, checkpoint_path: str) -> None:
        """Never asked for."""


class Members(NotPickled, tune.Callback):
    """Tells the ledger of a population's trials, which no search has handed out."""

    def __init__(self, search: LedgerSearch) -> None:
        self.search = search
        self.waiting = {trial.number: trial for trial in search.waiting}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (known := self.waiting.pop(trial.config["member"]["number"], None)) is not None:
            self.search.hand_out(trial.trial_id, known)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.search.on_trial_complete(trial.trial_id, flatten_dict(trial.last_result))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.search.on_trial_complete(trial.trial_id, error=True)


def member(trial: Trial) -> dict[str, Any]:
    """What Ray Tune is told of a trial."""
    return {"number": trial.number, "params": trial.params}


def outcome(study: StudyConfig, result: dict[str, Any] | None, error: bool, over: bool) -> dict[str, Any] | None:
    """What a trial's last word means for the ledger; None if it was interrupted and is to go on.

    Args:
        result: flattened, as Ray Tune hands it on. over: the study was ending when it ended.
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
    """What lay under `name` before Ray Tune flattened it."""
    return {key.removeprefix(f"{name}/"): value for key, value in result.items() if key.startswith(f"{name}/")}


def drop_checkpoints(study: StudyConfig, trial: Trial) -> None:
    """Remove the checkpoints of a trial that will never go on; its journal and pictures stay."""
    config = study.trial(trial.number, trial.params)
    store = open_store(config.checkpoint_url, config.s3)
    for key in store.list():
        store.delete(key)


def first_trials(study: StudyConfig, count: int) -> list[Trial]:
    """The trials that a study begins with, as far as they do not depend on results: for `--dry-run`."""
    trials: list[Trial] = []
    while len(trials) < min(count, study.budget.trials):
        params = suggest(study, trials)
        if params is None:
            break
        trials.append(Trial(len(trials), params))
    return trials
