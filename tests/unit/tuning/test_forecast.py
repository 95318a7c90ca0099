"""`glann tune --dry-run`: the trials it names are those that would start, its cost is the plan's times their share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from glann.trainers.plan.estimate import make_plan
from glann.tuning.forecast import SHOWN, Forecast, expected, forecast
from glann.tuning.ledger import Ledger
from glann.tuning.search import LedgerSearch
from glann.tuning.study import StudyConfig
from rich.console import Console
from study_folder import fill_study, make_study

SECOND = {"sampler.noise_dim": {"integer": [8, 32]}}


def printed(found: Forecast) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=200).print(found)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def hours(found: Forecast) -> list[float]:
    """That each kind of device is said to take."""
    return [float(note.split("about ")[1].split()[0]) for note in found.notes() if "-hours of training" in note]


def whole_run(found: Forecast) -> float:
    """Hours of a run that trains both stages to the end, at the rate that was measured for this forecast."""
    return found.estimates[0].device_hours


def test_the_trials_it_names_are_those_that_would_start(tmp_path: Path):
    study = make_study(tmp_path, search={"startup": 4})
    found = forecast(study)
    assert [trial.number for trial in found.planned] == [0, 1, 2, 3, 4]  # the recipe and four that no result decides
    search = LedgerSearch(study, Ledger(study.folder), lambda: 9, lambda: False)
    for trial in found.planned:
        given: Any = search.suggest(str(trial.number))
        assert given == {"member": {"number": trial.number, "params": trial.params}}
        search.on_trial_complete(str(trial.number), {"metrics/fd_squeezenet": 0.1 * trial.number})
    lines = printed(found)
    assert lines[0] == "study digits-study: 12 trials to start, 0 begun; nothing was started"
    assert lines[2] == "0      the base recipe"
    assert "... and 7 more, which depend on the results of these" in lines


def test_it_starts_nothing(tmp_path: Path):
    study = make_study(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    forecast(study)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_long_study_is_not_listed_to_its_end(tmp_path: Path):
    found = forecast(make_study(tmp_path, search={"kind": "random"}, budget={"trials": 5000}))
    assert len(found.planned) == SHOWN
    assert f"... and {5000 - SHOWN} more, which follow" in printed(found)


def test_a_grid_ends_before_a_larger_budget(tmp_path: Path):
    space = {"glo.generator_lr": {"choice": [0.001, 0.01]}, "sampler.noise_dim": {"choice": [8, 16]}}
    found = forecast(make_study(tmp_path, space=space, search={"kind": "grid"}, budget={"trials": 99}))
    assert (found.left, len(found.planned)) == (5, 5)
    assert not any("more, which" in note for note in found.notes())


def test_a_study_that_has_begun_counts_what_is_left(tmp_path: Path):
    study = make_study(tmp_path)
    fill_study(study, ["finished", "stopped", "failed", "running"])
    found = forecast(study)
    assert (found.left, found.begun, found.whole) == (8, 4, 0)
    assert hours(found)[0] == pytest.approx(whole_run(found) * expected(study) * 8, rel=0.01)


def test_nothing_is_left_of_a_study_that_is_through(tmp_path: Path):
    study = make_study(tmp_path, budget={"trials": 2})
    fill_study(study, ["finished", "finished", "finished"])  # its budget was larger
    found = forecast(study)
    assert (found.left, hours(found)[0]) == (0, 0.0)


def test_the_base_recipe_counts_whole_and_the_others_by_what_is_stopped(tmp_path: Path):
    study = make_study(tmp_path)
    assert 0 < expected(study) < 1
    found = forecast(study)
    assert hours(found)[0] == pytest.approx(whole_run(found) * (1 + 11 * expected(study)), rel=0.01)
    unstopped = study.model_copy(update={"scheduler": study.scheduler.model_copy(update={"kind": "none"})})
    found = forecast(unstopped)
    assert hours(found)[0] == pytest.approx(whole_run(found) * 12, rel=0.01)


def test_stage_one_counts_once_where_all_share_it(tmp_path: Path):
    study = make_study(tmp_path, space=SECOND, search={"kind": "random"})
    plan = make_plan(study.base())
    second = plan.costs["imle"].flops / sum(cost.flops for cost in plan.costs.values())
    found = forecast(study)
    assert hours(found)[0] == pytest.approx(whole_run(found) * (1 + 11 * second), rel=0.01)
    assert "all trials share one stage 1" in found.notes()


@pytest.mark.parametrize(
    ("grace", "reduction", "epochs"), [(1, 3, 9), (1, 3, 10), (2, 2, 20), (3, 4, 100), (5, 3, 12), (12, 3, 12)]
)
def test_the_share_that_runs_is_what_halving_leaves(tmp_path: Path, grace: int, reduction: int, epochs: int):
    study = make_study(
        tmp_path,
        overrides={"glo.epochs": epochs, "sampler.kind": "imle"},
        scheduler={"grace": grace, "reduction": reduction},
    )
    running, spent, rung = 1.0, 0.0, grace
    for epoch in range(1, epochs + 1):
        spent += running
        if epoch == rung:
            running, rung = running / reduction, rung * reduction
    assert expected(study) == pytest.approx(spent / epochs)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": {"grace": 500}},
        {"scheduler": {"kind": "none"}},
        {"space": SECOND},
        {"space": {"glo.latent_lr": {"uniform": [0.01, 0.1]}}, "search": {"kind": "population"}},
    ],
    ids=["long grace", "none", "stage 2 alone", "population"],
)
def test_all_of_it_runs_where_nothing_is_stopped(tmp_path: Path, changes: dict[str, Any]):
    study: StudyConfig = make_study(tmp_path, **changes)
    assert expected(study) == 1.0
