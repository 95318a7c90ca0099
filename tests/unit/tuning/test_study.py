"""A study is refused before it starts, in one line that helps; trials are what `glann train` makes of its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from glann.config.run import load
from glann.errors import UserError
from glann.tuning.folder import refuse_other_study
from glann.tuning.load import STUDIES, load_study
from glann.tuning.study import StudyConfig

IMLE = {"sampler.kind": "imle"}
GOOD: dict[str, Any] = {
    "name": "small",
    "recipe": "digits",
    "overrides": IMLE,
    "space": {"glo.latent_lr": {"log_uniform": [0.003, 0.1]}, "sampler.noise_dim": {"integer": [8, 32]}},
    "metric": "fd_squeezenet",
}
SECOND: dict[str, Any] = {"space": {"sampler.noise_dim": {"integer": [8, 32]}}}
# A few hundred characters that stand for ten billion numbers.
BOMB = "- &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"- &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def written(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def refusal(folder: Path, changes: dict[str, Any]) -> str:
    return refused(written(folder, changes))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_study(path)
    assert caught.value.exit_status == 2
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message or "in small on " in message  # where
    return message


def space(**dimensions: dict[str, Any]) -> dict[str, Any]:
    """A space of keys of stage 2: `space(lr={...})`."""
    return {"space": {f"imle.{key}": dimension for key, dimension in dimensions.items()}}


UNIFORM = {"uniform": [0.001, 0.1]}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_that_ship_can_be_started(path: Path):
    assert load_study(path.stem) == load_study(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrics": "l1"}, "unknown key metrics (did you mean metric?)"),
        ({"space": {"glo.latent_rl": UNIFORM}}, "unknown key 'glo.latent_rl' in space (did you mean glo.latent_lr?)"),
        ({"space": {"sampler.latent_lr": UNIFORM}}, "(did you mean glo.latent_lr?)"),
        ({"overrides": {"glo.epoch": 3}}, "unknown key glo.epoch (did you mean glo.epochs?)"),
        ({"overrides": {"glo.epochs": 0}}, "glo.epochs=0 is not possible"),
        ({"overrides": {"data.url.x": 3}}, "'data.url.x': url is a value, not a section"),
        ({"overrides": {"name": "other"}}, "overrides.name is set by the study"),
        ({"search": {"kind": "bayes"}}, "search.kind='bayes' is not possible"),
        ({"budget": {"trials": 0}}, "budget.trials=0 is not possible"),
        ({"budget": {"hours": float("nan")}}, "budget.hours=nan is not possible"),
        ({"scheduler": {"reduction": 1}}, "scheduler.reduction=1 is not possible"),
        ({"name": "../evil"}, "name='../evil' is not possible"),
        ({"metric": "fd_squeezenets"}, "no such metric (did you mean fd_squeezenet?)"),
        ({"metric": "fd_lite0:test"}, "no such metric"),
        ({"metric": "precision_codes:held-out"}, "held-out images have none; use precision_codes"),
        ({"metric": "copying_lite0"}, "against held-out images only; use copying_lite0:held-out"),
        ({"space": {}}, "space={} is not possible"),
        ({"recipe": None}, "give one of: recipe (both stages), or stage_one"),
        ({"stage_one": "runs/x"}, "give one of: recipe (both stages), or stage_one"),
        (
            {"metric": "flow/fd_lite0"},
            "metric=flow/fd_lite0 is not measured of trials; they measure fd_lite0 (of their own",
        ),
        ({"metric": "real/fd_lite0"}, "metric=real/fd_lite0 is not measured of trials"),
        ({"metric": "flows/fd_lite0"}, "; there are l1, psnr, fd_EXTRACTOR, fid, precision_EXTRACTOR, "),
        (SECOND | {"metric": "l1"}, "metric=l1 measures stage 1, which sampler.* does not change"),
        (SECOND | {"metric": "fd_lite0_glo"}, "metric=gaussian/fd_lite0 measures stage 1"),
        ({"metric": "fd_lite0", "overrides": {"evaluation.extractor": "vgg16"}}, "is measured by lite0, not by"),
    ],
)
def test_what_is_unknown_or_impossible_is_named(tmp_path: Path, changes: dict[str, Any], expected: str):
    assert expected in refusal(tmp_path, changes)


def test_the_own_sampler_may_be_named_by_its_kind_and_the_images_as_held_out(tmp_path: Path):
    for metric, canonical in (("imle/fd_lite0", "fd_lite0"), ("imle/fd_lite0:held-out", "fd_lite0:held-out")):
        assert load_study(written(tmp_path, {"metric": metric})).metric == canonical
    other = {"space": {"glo.latent_lr": {"log_uniform": [0.003, 0.1]}}, "overrides": {"sampler.kind": "gmm"}}
    assert "imle/fd_lite0 is not measured" in refusal(tmp_path, other | {"metric": "imle/fd_lite0"})
    assert load_study(written(tmp_path, other | {"metric": "gmm/fd_lite0"})).metric == "fd_lite0"


@pytest.mark.parametrize("metric", ["fd_lite0:held-out", "gaussian/fd_lite0:held-out", "copying_lite0:held-out"])
def test_a_study_can_compare_by_held_out_images(tmp_path: Path, metric: str):
    study = load_study(written(tmp_path, {"metric": metric}))
    assert study.metric == metric
    assert study.extractor_needed == "lite0"


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [
        ({"uniform": [0.1, 0.1]}, "uniform needs the smaller bound first, not 0.1 before 0.1"),
        ({"log_uniform": [0, 1]}, "log_uniform needs bounds above zero, and begins at 0.0"),
        ({"uniform": [1, 2, 3]}, "tuple should have at most 2 items"),
        ({"uniform": [0, float("inf")]}, "should be a finite number"),
        ({"uniform": ["low", 1]}, "space.sampler.lr.uniform.0='low' is not possible"),
        ({"integer": [1, 2.5]}, "space.sampler.lr.integer.1=2.5 is not possible"),
        ({"integer": [1, 2**53]}, "space.sampler.lr.integer.1=9007199254740992 is not possible"),
        ({"uniform": [0, 1], "choice": [1, 2]}, "give one of uniform, log_uniform, integer, log_integer, choice, not"),
        ({}, "give one of uniform, log_uniform, integer, log_integer, choice"),
        ({"choice": [1]}, "choice needs at least two distinct values"),
        ({"choice": [1, 2, 1]}, "choice needs at least two distinct values"),
        ({"choice": list(range(1001))}, "tuple should have at most 1000 items"),
        ({"choice": [{"a": 1}, {"b": 1}]}, "choice takes numbers, strings, or short lists of them"),
        ({"uniform": [0, 1], "steps": 3}, "unknown key space.sampler.lr.steps"),
    ],
)
def test_an_impossible_range_is_refused(tmp_path: Path, dimension: dict[str, Any], expected: str):
    assert expected in refusal(tmp_path, space(lr=dimension))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (space(lr={"uniform": [-1.0, 0.1]}), "space.sampler.lr admits -1.0, which is impossible: sampler.lr=-1.0"),
        (space(noise_dim={"choice": [8, "many"]}), 'space.sampler.noise_dim admits "many", which is impossible'),
        (space(noise_dim=UNIFORM), "space.sampler.noise_dim admits 0.001, which is impossible"),
        ({"space": {"generator.kind": {"choice": ["infogan", "resnet"]}}}, "generator.kind=resnet makes images from"),
        ({"space": {"loss.taps": {"choice": [["conv1"], 3]}}, "scheduler": {"kind": "none"}}, "admits 3, which"),
    ],
)
def test_a_value_that_the_recipe_cannot_have_is_found_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], expected: str
):
    assert expected in refusal(tmp_path, changes)


def when(**conditions: Any) -> dict[str, Any]:
    return UNIFORM | {"when": {f"imle.{key}": value for key, value in conditions.items()}}


NOISE = {"integer": [8, 32]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (space(lr=when(noise_dim=8)), "space.sampler.lr depends on sampler.noise_dim, which is not in the space"),
        (space(lr=when(noise_dim=33), noise_dim=NOISE), "sampler.noise_dim=33, which sampler.noise_dim never takes"),
        (
            space(lr=when(noise_dim=[8, 8.5]), noise_dim=NOISE),
            "sampler.noise_dim=8.5, which sampler.noise_dim never takes",
        ),
        (space(lr=when(noise_dim=[]), noise_dim=NOISE), "when.sampler.noise_dim is an empty list"),
        (
            space(lr=when(weight_decay=0.01), weight_decay=UNIFORM),
            "depends on sampler.weight_decay, which is continuous",
        ),
        (
            space(
                hidden_dim=NOISE | {"when": {"sampler.noise_dim": 8}},
                noise_dim=NOISE | {"when": {"sampler.hidden_dim": 8}},
            ),
            "the conditions of sampler.hidden_dim, sampler.noise_dim form a cycle",
        ),
        (space(noise_dim=NOISE | {"when": {"sampler.noise_dim": 8}}), "form a cycle"),
    ],
)
def test_a_condition_that_can_never_hold_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str):
    assert expected in refusal(tmp_path, changes)


def test_values_are_tried_out_under_all_the_conditions_that_they_are_searched_under(tmp_path: Path):
    kinds = {"generator.kind": {"choice": ["infogan", "resnet"], "when": {"data.resolution": 64}}}
    sizes = {"data.resolution": {"choice": [28, 64]}}
    widths = {"loss.patch": {"integer": [32, 64], "when": {"generator.kind": "resnet"}}}
    study = load_study(written(tmp_path, {"space": sizes | kinds | widths, "scheduler": {"kind": "none"}}))
    assert study.trial(1, {"data.resolution": 64, "generator.kind": "resnet", "loss.patch": 48}).loss.patch == 48


@pytest.mark.parametrize("key", ["glo", "glo.schedule", "sampler.search"])
def test_a_section_is_no_key(tmp_path: Path, key: str):
    assert f"space.{key} is a section" in refusal(tmp_path, {"space": {key: {"choice": [1, 2]}}})


@pytest.mark.parametrize(
    "key", ["name", "runs_dir", "cluster.workers", "data.url", "checkpoint.keep", "evaluation.samples", "tracking.uri"]
)
def test_what_is_no_property_of_a_model_is_not_searched(tmp_path: Path, key: str):
    assert f"space.{key} is not a property of a model" in refusal(tmp_path, {"space": {key: {"choice": [1, 2]}}})


def test_a_trial_that_would_train_something_else_is_refused(tmp_path: Path):
    """Under batch statistics, batches of one row have no gradient."""
    study = load_study(written(tmp_path, {"overrides": IMLE | {"sampler.statistics": "batch"}}))
    with pytest.raises(UserError, match=r"sampler\.batch_size=1 with sampler\.statistics=batch"):
        study.trial(1, {"sampler.batch_size": 1})


@pytest.mark.parametrize("count", [100_001, 10**12])
def test_a_grid_that_is_too_large_is_refused_at_once(tmp_path: Path, count: int):
    grid = {"search": {"kind": "grid"}} | space(noise_dim={"integer": [1, count]})
    assert "the grid has more than 100000 combinations" in refusal(tmp_path, grid)


def test_a_grid_has_no_continuous_keys(tmp_path: Path):
    assert "space.sampler.lr is continuous" in refusal(tmp_path, {"search": {"kind": "grid"}} | space(lr=UNIFORM))


def test_a_population_changes_what_can_change_on_the_way(tmp_path: Path):
    population = {"search": {"kind": "population", "interval": 2}}
    assert "space.sampler.noise_dim cannot change while a run trains" in refusal(tmp_path, population)
    study = load_study(written(tmp_path, population | {"space": {"glo.latent_lr": {"log_uniform": [0.01, 0.1]}}}))
    assert study.trial(3, {"glo.latent_lr": 0.02}).checkpoint.every_epochs == 2  # there is one to continue from


def test_different_losses_stop_no_trial(tmp_path: Path):
    losses = {"space": {"loss.pixel_weight": {"uniform": [0.5, 2]}}}
    assert "set scheduler.kind=none" in refusal(tmp_path, losses)
    assert not load_study(written(tmp_path, losses | {"scheduler": {"kind": "none"}})).stops_early


def test_scores_are_compared_where_they_are_measured(tmp_path: Path):
    """Also of different losses, which cannot be compared themselves."""
    by_score = {"space": {"loss.pixel_weight": {"uniform": [0.5, 2]}}, "scheduler": {"by": "score"}}
    assert "set evaluation.every_epochs in the overrides" in refusal(tmp_path, by_score)
    assert load_study(written(tmp_path, by_score | {"overrides": {"evaluation.every_epochs": 2}})).stops_early


def test_the_number_of_trials_may_be_given_beside_the_file(tmp_path: Path):
    path = written(tmp_path, {"budget": {"hours": 2}})
    assert load_study(path).budget.trials == 20
    assert load_study(path, trials=5).budget.model_dump() == {"trials": 5, "hours": 2, "gpu_hours": None}
    with pytest.raises(UserError, match="budget=3 is not possible"):
        load_study(written(tmp_path, {"budget": 3}), trials=5)


# A stage 1 that is given ----------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "config.yaml").write_text(load("digits", ["glo.epochs=3", "seed=7"]).to_yaml())
    return folder


def test_a_given_stage_one_is_what_trials_stand_on(tmp_path: Path, trained: Path):
    study = load_study(written(tmp_path, SECOND | {"recipe": None, "stage_one": str(trained), "name": "second"}))
    trial = study.trial(2, {"sampler.noise_dim": 9})
    assert (trial.glo.epochs, trial.seed, trial.sampler.noise_dim, trial.name) == (3, 7, 9, "second-0002")
    assert study.run_dir(0) == trained
    assert not study.stops_early


@pytest.mark.parametrize(
    "changes",
    [{}, SECOND | {"overrides": {"glo.epochs": 3}}, SECOND | {"overrides": {"generator": {"kind": "infogan"}}}],
)
def test_a_given_stage_one_is_done(tmp_path: Path, trained: Path, changes: dict[str, Any]):
    message = refusal(tmp_path, changes | {"recipe": None, "stage_one": str(trained)})
    assert f"belongs to stage 1, which stage_one={trained} has completed" in message


def test_a_stage_one_must_be_a_run_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere is not a run folder: it has no config\.yaml"):
        load_study(written(tmp_path, SECOND | {"recipe": None, "stage_one": "nowhere"}))


# Hostile files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "must hold keys such as `recipe:` and `space:`, not nothing"),
        (b"[1, 2]", "must hold keys such as `recipe:` and `space:`, not a list"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"name: [", "cannot be read as YAML"),
        (b"name: !!python/object/apply:os.system [id]", "cannot be read as YAML"),
        (b"[" * 5000, "more than 100 brackets are open"),
        (b"# " + b"x" * (1 << 20), "characters, more than"),
    ],
    ids=["empty", "list", "binary", "torn", "code", "nested", "long"],
)
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, text: bytes, expected: str):
    path = tmp_path / "hostile.yaml"
    path.write_bytes(text)
    assert expected in refused(path)


@pytest.mark.parametrize(
    "choices",
    [BOMB, "- !!timestamp 2020-01-01\n- 1\n", "- !!binary aGk=\n- 1\n", "- &a [*a]\n- 1\n", f"- 0x{'f' * 9000}\n- 1\n"],
)
@pytest.mark.timeout(60)
def test_choices_that_no_ledger_can_hold_are_refused_at_once(tmp_path: Path, choices: str):
    path = tmp_path / "hostile.yaml"
    indented = "".join(f"    {line}\n" for line in choices.splitlines())
    path.write_text(f"name: s\nrecipe: digits\nmetric: fd_lite0\nspace:\n  sampler.noise_dim:\n   choice:\n{indented}")
    message = refused(path)
    assert "choice takes numbers, strings, or short lists of them" in message
    assert len(message) < 2000


@pytest.mark.timeout(60)
def test_conditions_that_stand_for_billions_are_refused_at_once(tmp_path: Path):
    path = tmp_path / "hostile.yaml"
    indented = "".join(f"    {line}\n" for line in BOMB.splitlines())
    keys = "  sampler.noise_dim: {integer: [8, 32]}\n  sampler.lr:\n   uniform: [0.1, 1]\n"
    condition = f"   when:\n    sampler.noise_dim:\n{indented}"
    path.write_text(f"name: s\nrecipe: digits\nmetric: fd_lite0\nspace:\n{keys}{condition}")
    assert "which sampler.noise_dim never takes" in refused(path)


def test_a_study_that_is_not_there_is_told_with_those_that_are(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such study: nothing\.yaml \(give a YAML file, or one of: .*digits"):
        load_study("nothing.yaml")
    with pytest.raises(UserError, match=r"no such recipe: digit \(did you mean digits"):
        load_study(written(tmp_path, {"recipe": "digit"}))


# The runs that it is made of -----------------------------------------------------------------


def test_a_trial_is_what_glann_train_makes_of_the_same_values(tmp_path: Path):
    study = load_study(written(tmp_path, {"overrides": {"cluster.workers": 2, "glo.epochs": 4} | IMLE}))
    shared = ["cluster.workers=2", "glo.epochs=4", "sampler.kind=imle", "evaluation.extractor=squeezenet"]
    assert study.base() == load("digits", [*shared, "name=small", "runs_dir=studies"])
    named = ["name=small-0007", "runs_dir=studies/small/trials"]
    trial = study.trial(7, {"glo.latent_lr": 0.02, "sampler.noise_dim": 9})
    assert trial == load("digits", [*shared, *named, "glo.latent_lr=0.02", "sampler.noise_dim=9"])
    assert trial.run_dir == study.run_dir(7)


@pytest.mark.parametrize(
    ("metric", "extractor"),
    [("fd_lite0", "lite0"), ("fd_vgg16_glo", "vgg16"), ("gaussian/fid", "inception"), ("l1", None)],
)
def test_trials_are_measured_by_what_the_metric_is_named_for(tmp_path: Path, metric: str, extractor: str | None):
    study = load_study(written(tmp_path, {"metric": metric}))
    assert study.base().evaluation.extractor == (extractor or load("digits").evaluation.extractor)


def test_a_metric_with_the_suffix_of_old_is_the_one_of_today(tmp_path: Path):
    """Studies that began under the old name are resumed."""
    old, new = (load_study(written(tmp_path, {"metric": m})) for m in ("fd_lite0_glo", "gaussian/fd_lite0"))
    assert old == new
    assert load_study(written(tmp_path, {"metric": old.metric})) == old


def test_a_recipe_file_is_taken_as_it_is(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(load("digits", ["seed=5", "sampler.kind=imle"]).to_yaml())
    study = load_study(written(tmp_path, {"recipe": str(recipe)}))
    assert study.base() == load(recipe, ["name=small", "runs_dir=studies", "evaluation.extractor=squeezenet"])


@pytest.mark.parametrize(
    ("metric", "direction", "minimize"),
    [("l1", None, True), ("psnr", None, False), ("fd_lite0", None, True), ("psnr", "minimize", True)],
)
def test_the_better_way_is_the_metrics_unless_it_is_said(tmp_path: Path, metric: str, direction: Any, minimize: bool):
    assert load_study(written(tmp_path, {"metric": metric, "direction": direction})).minimize is minimize


# Its folder ----------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path) -> StudyConfig:
    """A study whose folder is there, as `glann tune` writes it."""
    study = load_study(written(tmp_path, {"studies_dir": str(tmp_path / "studies")})).with_absolute_paths()
    study.folder.mkdir(parents=True)
    (study.folder / "study.yaml").write_text(study.to_yaml())
    return study


def changed(study: StudyConfig, **changes: Any) -> StudyConfig:
    return StudyConfig.model_validate(study.model_dump(exclude_unset=True) | changes)


def test_a_folder_takes_its_own_study_with_any_budget(begun: StudyConfig):
    refuse_other_study(begun, begun.base())
    refuse_other_study(changed(begun, budget={"trials": 99, "hours": 1}), begun.base())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metric": "l1"}, "metric is 'fd_squeezenet' there and 'l1' here"),
        ({"space": SECOND["space"]}, "space is "),
        ({"overrides": {"glo.epochs": 3} | IMLE}, "overrides is {'sampler.kind': 'imle'} there and {'glo.epochs': 3, "),
        ({"search": {"seed": 1}}, "search is "),
        ({"scheduler": {"grace": 2}}, "scheduler is "),
    ],
)
def test_a_folder_refuses_another_study_naming_the_key(begun: StudyConfig, changes: dict[str, Any], expected: str):
    with pytest.raises(UserError) as caught:
        refuse_other_study(changed(begun, **changes), begun.base())
    assert f"{begun.folder} holds another study: {expected}" in str(caught.value)
    assert str(caught.value).endswith("give this one another name")
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_read_back_as_the_same_study(tmp_path: Path):
    study = load_study("digits").with_absolute_paths()
    path = tmp_path / "again.yaml"
    path.write_text(study.to_yaml())
    assert load_study(path) == study


def test_studies_of_a_critic_are_not_ruled_by_its_losses(tmp_path):
    changes = {"recipe": "gan-digits", "overrides": {}, "space": {"networks.critic.lr": {"log_uniform": [1e-5, 1e-3]}}}
    assert "do not rank trials" in refusal(tmp_path, changes)
    study = load_study(written(tmp_path, changes | {"scheduler": {"kind": "none"}}))
    assert study.base().networks.critic.kind == "infogan"
    shared = {"space": {"sampler.shape": {"choice": ["uniform", "normal"]}}, "scheduler": {"kind": "none"}}
    assert "no stage 1 to share" in refusal(tmp_path, changes | shared)
