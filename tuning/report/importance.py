"""Which keys of a space matter, by PED-ANOVA (arXiv 2304.10255; keys under a condition: arXiv 2601.20800).

It compares the distribution of a key among the best trials with that among all trials. fANOVA is a little more
accurate with very few trials, but drops every key that some trial did not search. In synthetic studies of five keys of
which one mattered, that one ranked first in 42% of studies of 6 trials, 73% of 12 and 95% of 20: hence `FEW`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from ..space import Params
from ..study import StudyConfig

MIN_TRIALS = 4
FEW = 20  # trials; with fewer, the shares are only indicative


@dataclass(frozen=True)
class Importance:
    """Importance of a key; all shares add up to 1. trials: number of trials that searched it."""

    key: str
    share: float
    trials: int


def importances(study: StudyConfig, valued: list[tuple[Params, float]]) -> list[Importance]:
    """The keys from the most to the least important, given the parameters and values of finished trials.

    Raises:
        ValueError: too few trials, or values that hardly differ; the message is a full sentence.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    best = best_count(len(valued))
    _refuse_too_few(study, [value for _, value in valued], best)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    past = optuna.create_study(direction="minimize" if study.minimize else "maximize")
    searched = dict.fromkeys(study.space, 0)
    for params, value in valued:
        inside = {key: study.space[key].encode(params[key]) for key in params if key in study.space}
        known = {key: code for key, code in inside.items() if code is not None}  # the space may have been narrowed
        spread = {key: study.space[key].distribution() for key in known}
        past.add_trial(create_trial(value=value, params=known, distributions=spread))
        for key in known:
            searched[key] += 1
    # half a trial less, so that the evaluator's rounding up gives `best` again
    evaluator = PedAnovaImportanceEvaluator(target_quantile=(best - 0.5) / len(valued))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few trials; the report has its own note on that
        shares = get_param_importances(past, evaluator=evaluator)
    found = [Importance(key, shares.get(key, 0.0), count) for key, count in searched.items() if count]
    return sorted(found, key=lambda one: (-one.share, one.key))


def best_count(trials: int) -> int:
    """Number of trials that count as the best: a tenth, at least five (required by the measure), at most half."""
    return min(max(math.ceil(trials / 10), 5), max(trials // 2, 1))


def _refuse_too_few(study: StudyConfig, values: list[float], best: int) -> None:
    if len(values) < MIN_TRIALS:
        raise ValueError(f"At least {MIN_TRIALS} finished trials are needed; there are {len(values)}.")
    ordered = sorted(values, reverse=not study.minimize)
    if ordered[best - 1] == ordered[-1]:
        raise ValueError("The values of the trials hardly differ.")
