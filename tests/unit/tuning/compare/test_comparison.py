"""What a comparison may say, and the runs that it makes: alike in all but what a method changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from comparison_folder import make_comparison
from glann.config.run import COMPARISONS, RECIPES, bundled_recipes, load
from glann.errors import UserError
from glann.tuning.compare.comparison import Cell, load_comparison, parse_comparison

BUNDLED = sorted(path.stem for path in RECIPES.glob(f"{COMPARISONS}*.yaml"))


def written(folder: Path, **changes) -> Path:
    tree = {"name": "mine", "recipe": "digits", "methods": {"imle": None, "gmm": {"sampler.kind": "gmm"}}}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_comparison_is_found_by_its_names_and_every_method_can_be_started(name: str):
    comparison = load_comparison(name)
    assert load_comparison(name.removeprefix(COMPARISONS)) == comparison == load_comparison(f"configs/{name}.yaml")
    for cell in comparison.cells():
        comparison.run(cell)
    assert name not in [path.stem for path in bundled_recipes()], "a comparison is no recipe"


def test_methods_that_differ_in_their_sampler_alone_share_the_stage_1_of_the_first(tmp_path):
    comparison = make_comparison(tmp_path)
    assert comparison.stage_ones == {"imle": "imle", "gmm": "imle", "ot": "imle", "published": "published"}
    first, second = comparison.run(Cell("imle", 1)), comparison.run(Cell("gmm", 1))
    assert first.stage_one is None
    assert second.stage_one == str(first.run_dir)
    assert second.seed == first.seed == 1
    assert second.sampler.kind == "gmm"
    assert comparison.run(Cell("published", 1)).stage_one is None


def test_a_method_of_another_recipe_has_the_data_the_workers_and_the_measures_of_the_others(tmp_path):
    comparison = make_comparison(tmp_path, overrides={"data.max_rows": 600})
    ours, other = comparison.run(Cell("imle", 0)), comparison.run(Cell("published", 0))
    for section in ("data", "cluster", "evaluation", "tracking"):
        assert getattr(ours, section) == getattr(other, section)
    assert other.data.max_rows == 600
    assert other.glo == load("paper-mnist").glo
    assert other.generator.width == 64


def test_keys_of_a_sampler_are_kept_wherever_its_kind_stands(tmp_path):
    comparison = load_comparison(written(tmp_path, methods={"flow": {"sampler.steps": 3, "sampler.kind": "flow"}}))
    assert comparison.run(Cell("flow", 0)).sampler.steps == 3


def test_the_measures_of_a_comparison_stay_where_only_some_are_given(tmp_path):
    evaluation = load_comparison(written(tmp_path, evaluation={"samples": 300})).evaluation
    assert (evaluation.samples, evaluation.extractor) == (300, "lite0-96")
    assert "kid" in evaluation.metrics


@pytest.mark.parametrize("evaluation", [{}, {"extractor": "squeezenet", "metrics": []}])
def test_a_comparison_is_read_back_as_it_was_written(tmp_path, evaluation):
    """Also measures that are the defaults of a recipe, and not those of a comparison."""
    comparison = load_comparison(written(tmp_path, evaluation=evaluation))
    assert parse_comparison(comparison.to_yaml().encode()) == comparison


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": {"a": {"glo.epoch": 3}}},
            r"unknown key 'glo\.epoch' \(did you mean glo\.epochs\?\)",
        ),
        (
            {"methods": {"a": {"data.max_rows": 3}}},
            r"methods\.a\.data\.max_rows is the same.*overrides",
        ),
        ({"methods": {"a": {"seed": 3}}}, r"methods\.a\.seed is the same for all methods"),
        ({"methods": {"a": {"glo.epochs": -3}}}, r"method a: .*glo\.epochs"),
        ({"methods": {"a": {"recipe": "digit"}}}, r"method a: no such recipe: digit \(did you mean digits\?\)"),
        ({"methods": {"../a": {}}}, "methods has the name"),
        ({"methods": {}}, "methods"),
        ({"seeds": [1, 1]}, "seeds are different numbers"),
        ({"ratio": ["imle", "gm"]}, r"ratio names 'gm'.*did you mean gmm\?"),
        ({"overrides": {"evaluation.samples": 3}}, r"overrides\.evaluation\.samples is the same for all"),
        ({"budget_minutes": 0}, "budget_minutes"),
        ({"sedes": [1]}, r"sedes.*did you mean seeds"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_comparison(written(tmp_path, **changes))
    assert "mine.yaml" in str(caught.value) or "method a" in str(caught.value)


def test_a_file_that_is_none_names_those_that_there_are():
    with pytest.raises(UserError, match=r"no such comparison: nothing .*compare-samplers"):
        load_comparison("nothing")
