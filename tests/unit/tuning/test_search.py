"""The search of a study: a function of the ledger, within budget and capacity, that learns; how each end counts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from glann.trainers.run.preflight import sole_command
from glann.tuning import ledger as ledgers
from glann.tuning.ledger import Ledger, Trial
from glann.tuning.search import LedgerSearch, first_trials, outcome, suggest
from glann.tuning.study import StudyConfig
from ray.tune.search import Searcher
from study_folder import make_study

SMOOTH: dict[str, Any] = {
    "glo.latent_lr": {"log_uniform": [0.001, 1.0]},
    "sampler.noise_dim": {"integer": [8, 64]},
    "sampler.weight_decay": {"uniform": [0.0, 1.0]},
    "sampler.statistics": {"choice": ["noise", "batch"]},
}


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    return make_study(tmp_path, space=SMOOTH, search={"seed": 3, "startup": 4}, budget={"trials": 6})


def smooth(params: dict[str, Any]) -> float:
    """One valley, lowest at 0.03, 24, 0.2 and noise."""
    valley = math.log10(params["glo.latent_lr"] / 0.03) ** 2 + ((params["sampler.noise_dim"] - 24) / 28) ** 2
    return valley + (params["sampler.weight_decay"] - 0.2) ** 2 + (params["sampler.statistics"] == "batch")


def searched(study: StudyConfig, count: int) -> list[Trial]:
    """So many trials, one after another."""
    trials: list[Trial] = []
    while len(trials) < count:
        params = suggest(study, trials)
        assert params is not None
        trials.append(Trial(len(trials), params, "finished", smooth(params) if params else 1.0))
    return trials


# The next trial ------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [{}, {"kind": "random"}, {"kind": "grid"}])
def test_the_first_trial_is_the_base_recipe(tmp_path: Path, search: dict[str, Any]):
    study = make_study(tmp_path, space={"sampler.noise_dim": {"integer": [8, 9]}}, search=search)
    assert suggest(study, []) == {}
    assert study.trial(0, {}).sampler == study.base().sampler


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_the_same_ledger_gives_the_same_next_trial(study: StudyConfig, kind: str):
    study = study.model_copy(update={"search": study.search.model_copy(update={"kind": kind})})
    written = Ledger(study.folder)
    for trial in searched(study, 9):
        started = written.start(trial.params)
        if trial.number == 4:
            written.end(started, state="stopped", epoch=3, loss=0.7)
        elif trial.number == 5:
            written.end(started, state="failed", why="lost")
        elif trial.number != 8:
            written.end(started, state="finished", value=trial.value, metrics={study.metric: trial.value or 0.0})
    expected = suggest(study, written.trials)
    assert suggest(study, ledgers.trials(study.folder).values()) == expected  # as the next start reads it
    other = study.search.model_copy(update={"seed": 4})
    assert suggest(study.model_copy(update={"search": other}), written.trials) != expected


def test_trials_that_run_at_the_same_time_differ(study: StudyConfig):
    tried = [trial.params for trial in first_trials(study, 6)]
    assert len({str(params) for params in tried}) == 6


def test_what_a_study_begins_with_is_what_it_would_hand_out(study: StudyConfig):
    search = LedgerSearch(study, Ledger(study.folder), lambda: 9, lambda: False)
    assert [handed(search, n)["params"] for n in range(5)] == [trial.params for trial in first_trials(study, 5)]
    assert len(first_trials(study, 99)) == study.budget.trials


def test_a_grid_ends(tmp_path: Path):
    space = {"sampler.noise_dim": {"integer": [8, 9]}, "sampler.statistics": {"choice": ["noise", "batch"]}}
    study = make_study(tmp_path, space=space, search={"kind": "grid"}, budget={"trials": 99})
    tried = [trial.params for trial in first_trials(study, 99)]
    assert tried == [
        {},
        *({"sampler.noise_dim": n, "sampler.statistics": s} for n in (8, 9) for s in ("noise", "batch")),
    ]
    search = LedgerSearch(study, Ledger(study.folder), lambda: 99, lambda: False)
    for number in range(5):
        handed(search, number)
    assert search.suggest("more") is None  # others still run
    for number in range(5):
        search.on_trial_complete(str(number), {"metrics/fd_squeezenet": 0.5})
    assert search.suggest("more") == Searcher.FINISHED


def test_tpe_learns(tmp_path: Path):
    """Beside random search: the last 20 of 60 trials, averaged over three seeds."""
    late: dict[str, list[float]] = {"tpe": [], "random": []}
    for seed in range(3):
        for kind, found in late.items():
            study = make_study(tmp_path / f"{kind}{seed}", space=SMOOTH, search={"kind": kind, "seed": seed})
            found += [trial.value or 0.0 for trial in searched(study, 60)[-20:]]
    assert sum(late["tpe"]) < 0.5 * sum(late["random"])


def test_tpe_learns_the_way_that_is_better(tmp_path: Path):
    study = make_study(tmp_path, space=SMOOTH, metric="psnr")
    found = [smooth(trial.params) for trial in searched(study, 60)[-20:]]
    assert min(found) > 1.0  # away from the valley


def test_tpe_learns_from_trials_that_were_stopped(tmp_path: Path):
    """Of trials that never finish it knows the last loss alone."""
    study = make_study(tmp_path, space=SMOOTH, search={"seed": 1})
    trials = [Trial(0, {}, "finished", 1.0)]
    while len(trials) < 60:
        params = suggest(study, trials) or {}
        trials.append(Trial(len(trials), params, "stopped", epoch=3, loss=smooth(params)))
    early, late = trials[1:11], trials[-20:]
    assert sum(t.loss or 0.0 for t in late) / 20 < 0.5 * sum(t.loss or 0.0 for t in early) / 10


# Handing out ---------------------------------------------------------------------------------


def handed(search: LedgerSearch, number: int) -> dict[str, Any]:
    """The trial that Ray is given under the id `number`."""
    given: Any = search.suggest(str(number))
    assert isinstance(given, dict), given
    return given["member"]


def test_interrupted_trials_come_first_under_their_number(study: StudyConfig):
    written = Ledger(study.folder)
    for number, params in enumerate(trial.params for trial in first_trials(study, 4)):
        started = written.start(params)
        if number in (0, 2):
            written.end(started, state="finished", value=0.5, metrics={study.metric: 0.5})
    written.close()
    search = LedgerSearch(study, Ledger(study.folder), lambda: 9, lambda: False)
    assert [handed(search, n) for n in range(2)] == [
        {"number": n, "params": search.ledger.trials[n].params} for n in (1, 3)
    ]
    assert [handed(search, n)["number"] for n in range(2, 4)] == [4, 5]
    assert search.suggest("more") is None
    assert len(ledgers.trials(study.folder)) == study.budget.trials


@pytest.mark.parametrize("seed", range(8))
def test_there_are_never_more_than_the_budget_or_the_room(tmp_path: Path, seed: int):
    """Trials end in any order and any way while the capacity changes; in the end all are through."""
    rng = random.Random(seed)
    study = make_study(tmp_path, space=SMOOTH, search={"kind": "random"}, budget={"trials": 15})
    capacity, ids, running = 3, 0, set[str]()
    search = LedgerSearch(study, Ledger(study.folder), lambda: capacity, lambda: False)
    while True:
        capacity = rng.randint(1, 4)
        given = search.suggest(str(ids))
        if given == Searcher.FINISHED:
            break
        if isinstance(given, dict):
            running.add(str(ids))
            ids += 1
            assert len(running) <= capacity
        elif running and rng.random() < 0.7:
            ended = rng.choice(sorted(running))
            running.remove(ended)
            result = rng.choice([{"metrics/fd_squeezenet": rng.random()}, {"reached_epoch": 2}, {"why": "diverged"}])
            search.on_trial_complete(ended, result, error=rng.random() < 0.1)
    assert not running
    assert ids == 15
    assert [trial.number for trial in search.ledger.trials] == list(range(15))
    assert all(trial.ended for trial in search.ledger.trials)


def test_a_smaller_budget_starts_nothing_new_and_ends_what_was_begun(study: StudyConfig):
    written = Ledger(study.folder)
    for params in ({}, {"sampler.noise_dim": 9}):
        written.start(params)
    study = study.model_copy(update={"budget": study.budget.model_copy(update={"trials": 1})})
    search = LedgerSearch(study, written, lambda: 9, lambda: False)
    assert [handed(search, n)["number"] for n in range(2)] == [0, 1]
    assert search.suggest("more") is None


# Ends ----------------------------------------------------------------------------------------

REACHED = {"params/sampler.noise_dim": 9, "reached_epoch": 3, "reached_loss": 0.8}
FACTS = {"params": {"sampler.noise_dim": 9}, "epoch": 3, "loss": 0.8}
MEASURED = {"metrics/fd_squeezenet": 0.3, "metrics/l1": 0.1}
METRICS = {"fd_squeezenet": 0.3, "l1": 0.1}


@pytest.mark.parametrize(
    ("result", "error", "expected"),
    [
        (REACHED | MEASURED, False, FACTS | {"state": "finished", "value": 0.3, "metrics": METRICS}),
        (REACHED, False, FACTS | {"state": "stopped"}),
        (REACHED | {"why": "diverged"}, False, FACTS | {"state": "failed", "why": "diverged"}),
        (
            REACHED | {"metrics/l1": 0.1},
            False,
            FACTS | {"state": "failed", "metrics": {"l1": 0.1}, "why": "it has no finite fd_squeezenet"},
        ),
        (REACHED | {"interrupted": True}, False, None),
        (None, False, None),
        (None, True, {"state": "failed", "why": "its process was lost"}),
    ],
    ids=["finished", "stopped", "failed", "not measured", "interrupted", "no word", "process lost"],
)
def test_what_an_end_means(study: StudyConfig, result: Any, error: bool, expected: Any):
    assert outcome(study, result, error, over=False) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_a_failure_and_the_study_goes_on(study: StudyConfig, value: float):
    search = LedgerSearch(study, Ledger(study.folder), lambda: 9, lambda: False)
    handed(search, 0)
    handed(search, 1)
    search.on_trial_complete("1", {"metrics/fd_squeezenet": value, "metrics/l1": 0.1})
    assert (search.ledger.trials[1].state, search.ledger.trials[1].metrics) == ("failed", {"l1": 0.1})
    assert handed(search, 2)["number"] == 2


@pytest.mark.parametrize(
    ("result", "error"), [(REACHED, False), (REACHED | {"interrupted": True}, False), (None, False), (None, True)]
)
def test_trials_that_end_because_the_study_does_are_to_go_on(study: StudyConfig, result: Any, error: bool):
    over = False
    search = LedgerSearch(study, Ledger(study.folder), lambda: 9, lambda: over)
    handed(search, 0)
    search.began["0"] -= 100
    over = True
    assert search.suggest("more") is None  # one still runs
    search.on_trial_complete("0", result, error)
    left = ledgers.trials(study.folder)[0]
    assert (left.state, left.value, left.metrics) == ("running", None, {})
    assert left.seconds == pytest.approx(100, abs=50)  # what it took is not forgotten
    assert search.suggest("more") == Searcher.FINISHED
    again = LedgerSearch(study, Ledger(study.folder), lambda: 9, lambda: False)
    assert handed(again, 0) == {"number": 0, "params": {}}


def test_a_trial_that_is_interrupted_for_a_reason_of_its_own_is_handed_out_again(study: StudyConfig):
    """Its nodes were taken away, and the study is not ending."""
    search = LedgerSearch(study, Ledger(study.folder), lambda: 1, lambda: False)
    first = handed(search, 0)
    search.on_trial_complete("0", REACHED | {"interrupted": True})
    assert handed(search, 1) == first


def test_a_trial_that_finishes_as_the_study_ends_has_finished(study: StudyConfig):
    over = False
    search = LedgerSearch(study, Ledger(study.folder), lambda: 9, lambda: over)
    handed(search, 0)
    over = True
    search.on_trial_complete("0", MEASURED)
    assert ledgers.trials(study.folder)[0].value == 0.3


def test_what_ray_tells_of_trials_that_are_not_ours_is_passed_over(study: StudyConfig):
    search = LedgerSearch(study, Ledger(study.folder), lambda: 9, lambda: False)
    search.on_trial_complete("stranger", MEASURED)
    assert ledgers.trials(study.folder) == {}


# Checkpoints ---------------------------------------------------------------------------------


@contextmanager
def training(study: StudyConfig, number: int) -> Iterator[Path]:
    """A trial's run folder, with a checkpoint and a journal, while its process has it; the checkpoint folder."""
    config = study.trial(number, {})
    saved = config.run_dir / "checkpoints" / "step-000003"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    (config.run_dir / "metrics.jsonl").write_text("")
    with sole_command(config.run_dir, "train"):
        yield saved.parent


def test_checkpoints_of_a_stopped_trial_go_when_its_run_folder_is_let_go_of(study: StudyConfig):
    search = LedgerSearch(study, Ledger(study.folder), lambda: 2, lambda: False)
    handed(search, 0)
    handed(search, 1)
    with training(study, 1) as checkpoints:
        search.on_trial_complete("1", REACHED)
        assert ledgers.trials(study.folder)[1].state == "stopped"
        assert search.suggest("2") is None  # its workers still have their places
        assert (checkpoints / "step-000003" / "manifest.json").exists()
    assert handed(search, 2)["number"] == 2
    assert not any(checkpoints.rglob("*.json"))
    assert (checkpoints.parent / "metrics.jsonl").exists()


@pytest.mark.parametrize("result", [MEASURED, {"why": "diverged"}, {"interrupted": True}])
def test_checkpoints_of_all_others_stay(study: StudyConfig, result: dict[str, Any]):
    search = LedgerSearch(study, Ledger(study.folder), lambda: 2, lambda: False)
    handed(search, 0)
    with training(study, 0) as checkpoints:
        search.on_trial_complete("0", result)
    search.settle()
    assert not search.closing
    assert (checkpoints / "step-000003" / "manifest.json").exists()


def test_a_study_that_was_killed_in_between_removes_them_at_its_next_start(study: StudyConfig):
    search = LedgerSearch(study, Ledger(study.folder), lambda: 1, lambda: False)
    handed(search, 0)
    with training(study, 0) as checkpoints:
        search.on_trial_complete("0", REACHED)
    again = LedgerSearch(study, Ledger(study.folder), lambda: 1, lambda: False)
    assert handed(again, 1)["number"] == 1
    assert not any(checkpoints.rglob("*.json"))
