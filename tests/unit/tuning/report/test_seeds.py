"""The best of a study can be trained again with seeds that the search has not seen, by one command."""

from __future__ import annotations

import pytest
from glann.tuning.compare.comparison import Cell, load_comparison
from glann.tuning.report.seeds import SEEDS_FILE
from glann.tuning.report.study import write_report
from study_folder import fill_study, make_study


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "studies")


def best_of(study, trials):
    return min((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value)


def test_the_comparison_trains_the_best_values_and_the_recipe_as_the_study_did(study):
    best = best_of(study, fill_study(study))
    page = write_report(study).read_text()
    assert f"glann compare {study.folder / SEEDS_FILE}" in page
    comparison = load_comparison(study.folder / SEEDS_FILE)
    assert comparison.seeds == (1, 2, 3, 4, 5), "not the seed of the search"
    changed = {"name", "runs_dir", "seed", "stage_one"}
    for method, number, params in (("best", best.number, best.params), ("recipe", 0, {})):
        expected = study.trial(number, params).model_dump(exclude=changed)
        assert comparison.run(Cell(method, 1)).model_dump(exclude=changed) == expected


def test_there_is_none_without_a_trial_that_beats_the_recipe(study):
    fill_study(study, ["finished"])
    assert "glann compare" not in write_report(study).read_text()
    assert not (study.folder / SEEDS_FILE).exists()


def test_there_is_none_if_the_data_were_searched_which_methods_share(tmp_path):
    study = make_study(tmp_path, space={"data.max_rows": {"integer": [100, 1500]}}, overrides={"glo.epochs": 12})
    fill_study(study, ["finished"] * 6)
    write_report(study)
    assert not (study.folder / SEEDS_FILE).exists()


def test_a_long_name_is_cut(tmp_path):
    study = make_study(tmp_path, name="a-study-with-a-name-of-more-than-forty-letters")
    fill_study(study)
    write_report(study)
    assert load_comparison(study.folder / SEEDS_FILE).name == "a-study-with-a-name-of-more-than-f-seeds"
