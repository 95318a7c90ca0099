"""The configuration refuses, before anything starts, whatever is unknown or impossible, in one line that helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from glann.config.paths import absolute
from glann.config.reference import describe_keys
from glann.config.run import Config, find_recipe, known_keys, load, require_trainable, validate
from glann.errors import UserError
from pydantic import ValidationError

SMALL = {
    "name": "small",
    "data": {"url": "data/x", "resolution": 28, "channels": 1},
    "generator": {"kind": "infogan"},
    "glo": {"epochs": 2},
}


def refusal(*overrides: str, recipe: str = "digits") -> str:
    with pytest.raises(UserError) as caught:
        load(recipe, list(overrides))
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_overrides_are_typed_by_yaml_and_leave_the_rest_alone():
    before, after = load("digits"), load("digits", ["glo.epochs=7", "data.max_rows=null", "loss.taps=[conv1, fire3]"])
    assert after.glo.epochs == 7
    assert after.data.max_rows is None
    assert after.loss.taps == ("conv1", "fire3")
    assert after.model_copy(update={"glo": before.glo, "loss": before.loss}) == before


def test_an_unknown_key_names_the_closest_known_one():
    assert refusal("glo.epoch=3").startswith("unknown key glo.epoch (did you mean glo.epochs?)")


def test_a_key_with_its_section_in_front_is_shown_as_a_file_has_it(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(load("digits").to_yaml() + "data.url: elsewhere\n")
    with pytest.raises(UserError, match=r"unknown key 'data.url': .* in its section, `data: \{url: ...\}`; in .*mine"):
        load(recipe)


@pytest.mark.parametrize(
    ("recipe", "override"),
    [("gan-digits", "from=x"), ("digits", "glo.batch_size=1"), ("digits", "imle.epoch=3"), ("digits", "seed=-1")],
)
def test_a_fault_of_an_override_does_not_name_the_file(recipe, override):
    assert ".yaml" not in refusal(override, recipe=recipe)


def test_a_fault_of_the_file_names_it_beside_an_override(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(load("digits").to_yaml() + "epochs: 3\n")
    with pytest.raises(UserError, match=r"unknown key epochs.*; in .*mine.yaml"):
        load(recipe, ["seed=3"])


def test_a_known_key_in_the_wrong_section_is_found():
    assert "did you mean generator.latent_dim?" in refusal("glo.latent_dims=64")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("glo.epochs=many", "glo.epochs='many' is not possible"),
        ("glo.epochs=0", "glo.epochs=0 is not possible"),
        ("glo.latent_lr=.inf", "glo.latent_lr=inf is not possible"),
        ("glo.latent_lr=.nan", "glo.latent_lr=nan is not possible"),
        ("engine.zero=4", "engine.zero=4 is not possible"),
        ("data.resolution=100", "data.resolution=100 is not possible"),
        ("name=../evil", "name='../evil' is not possible"),
        ("data=3", "data=3 is not possible"),
        ("data.url.x=3", "data.url is a value, not a section"),
        ("glo", "cannot read override 'glo'"),
        ("=3", "cannot read override '=3'"),
        ("glo.epochs=[", "cannot read the value of override"),
    ],
)
def test_what_cannot_be_is_refused_and_named(override: str, expected: str):
    message = refusal(override)
    assert expected in message or expected.replace("data.url is", "url is") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["data.resolution=128"], "use generator.kind=resnet"),
        (["generator.kind=resnet"], "use generator.kind=infogan"),
        (["cluster.workers={min: 1, max: 200}"], "use at least 200"),
        (["cluster.workers=50", "engine.accumulation=3"], "use at least 150"),
        (["engine.accumulation=2"], "set engine.accumulation=1, and to save memory lower glo.batch_size"),
        (["glo.batch_size=1", "cluster.workers=1"], "use at least 2, or set generator.batch_norm=false"),
        (["cluster.workers={min: 3, max: 2}"], "min must not be larger"),
        (["engine.kind=torch"], "set cluster.workers=1 and engine.zero=0"),
        (
            ["sampler.kind=imle", "sampler.batch_size=1", "sampler.statistics=batch"],
            "use at least 3, or set sampler.statistics=noise",
        ),
        (
            ["sampler.kind=imle", "imle.batch_size=2", "imle.statistics=batch"],
            "use at least 3, or set sampler.statistics=noise",
        ),
        (["sampler.kind=gmm", "sampler.noise_dim=8"], "sampler.noise_dim is no key of sampler.kind=gmm"),
        (["loss.patch=64"], "loss.patch=64 is larger than data.resolution=28"),
    ],
)
def test_impossible_combinations_name_the_remedy(overrides: list[str], remedy: str):
    assert remedy in refusal(*overrides)


def test_accumulation_is_refused_with_batchnorm_alone_and_a_run_that_has_both_can_still_be_read():
    load("digits", ["engine.accumulation=2", "generator.batch_norm=false"])
    load("celebahq-1024", ["engine.accumulation=2"])  # the resnet has none
    both = validate(SMALL | {"engine": {"accumulation": 2}}, "config.yaml of a run of glann 0.1")
    with pytest.raises(UserError, match=r"engine\.accumulation=2 with generator\.batch_norm=true"):
        require_trainable(both)


def test_workers_are_a_number_or_a_range():
    for given, least, most in (("2", 2, 2), ("{min: 1, max: 8}", 1, 8)):
        config = load("digits", [f"cluster.workers={given}"])
        assert (config.cluster.min_workers, config.cluster.max_workers) == (least, most)
        assert validate(yaml.safe_load(config.to_yaml()), "its own YAML") == config
    assert refusal("cluster.workers={min: 1}").startswith("missing key cluster.workers.max: most workers")
    assert "did you mean cluster.workers.max?" in refusal("cluster.workers={min: 1, maxx: 3}")
    assert "cluster.workers.min=0 is not possible" in refusal("cluster.workers={min: 0, max: 3}")
    assert "cluster.workers='many' is not possible" in refusal("cluster.workers=many")


@pytest.mark.parametrize(
    ("overrides", "blames"),
    [
        (["glo.epochs=0"], False),
        (["engine.kind=torch"], False),
        (["imle.hidden_dim=-1"], False),
        (["seed=3"], True),
        (["glo.latent=3"], False),
    ],
)
def test_a_fault_of_the_command_line_does_not_blame_the_file(tmp_path, overrides: list[str], blames: bool):
    """The file's own fault does, also beside good overrides."""
    recipe = tmp_path / "mine.yaml"
    glo = SMALL["glo"] | {"epochs": 0} if blames else SMALL["glo"]
    recipe.write_text(yaml.safe_dump(SMALL | {"glo": glo, "cluster": {"workers": 2}}))
    with pytest.raises(UserError) as caught:
        load(recipe, overrides)
    assert ("mine.yaml" in str(caught.value)) == blames


@pytest.mark.parametrize(
    ("key", "free"),
    [
        *((f"engine.{name}", True) for name in ("kind", "zero", "activation_checkpointing", "compile")),
        *((f"engine.{name}", False) for name in ("clip_norm", "precision", "accumulation")),
        ("cluster.workers", True),
        ("glo.latent_lr", False),
    ],
)
def test_what_may_change_on_resume_changes_no_number(key: str, free: bool):
    from glann.trainers.run.preflight import may_change

    assert may_change(key) == free


def test_every_fault_is_told_at_once():
    message = refusal("glo.epoch=3", "engine.zero=9")
    assert "glo.epoch" in message
    assert "engine.zero=9" in message


def test_a_missing_key_says_what_it_is_for():
    with pytest.raises(UserError, match=r"missing key data: .*; in here"):
        validate({key: value for key, value in SMALL.items() if key != "data"}, "here")
    with pytest.raises(UserError, match=r"missing key data.url: folder of a packed data set"):
        validate(SMALL | {"data": {"resolution": 28}}, "here")


def test_a_partial_schedule_keeps_the_published_halving():
    glo = validate(SMALL | {"glo": {"epochs": 2, "schedule": {"every": 10}}}, "here").glo
    assert (glo.schedule.kind, glo.schedule.every) == ("halving", 10)


def test_values_never_change():
    config = load("digits")
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.glo.epochs = 3  # type: ignore[misc]


def test_the_printed_configuration_is_the_configuration():
    for name in ("digits", "celebahq-1024"):
        config = load(name, ["loss.taps=[a, b]", "seed=5"])
        assert validate(yaml.safe_load(config.to_yaml()), "printed") == config


@pytest.mark.parametrize(
    "text",
    ["- a\n- b\n", "just words", "a: [", "!!python/object/apply:os.system ['true']", "a: &x [*x]\n", "\0", ""],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert "bad.yaml" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_file_of_bytes_is_refused(tmp_path: Path):
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not valid YAML"):
        load(path)


def test_recipes_are_found_by_name_and_misspelt_ones_suggested():
    assert find_recipe("digits") == find_recipe("configs/digits.yaml").resolve() or find_recipe("digits").is_file()
    with pytest.raises(UserError, match="did you mean celebahq-1024"):
        find_recipe("celebhq-1024")
    with pytest.raises(UserError, match="no such recipe"):
        find_recipe("/nowhere/digits.yaml")


def test_checkpoints_lie_in_the_run_folder_or_below_the_given_url():
    assert load("digits").checkpoint_url.endswith("/runs/digits/checkpoints")
    config = load("digits", ["checkpoint.url=s3://bucket/runs/", "name=a"])
    assert config.checkpoint_url == "s3://bucket/runs/a/checkpoints"


def test_every_key_is_described_and_accepted():
    """What `glann config --keys` prints is complete: each key has a meaning and is part of the schema."""
    keys = describe_keys()
    assert len(keys) > 60
    assert [key.name for key in keys if not key.meaning] == []
    assert {key.name for key in keys} < set(known_keys())
    defaults = {key.name: key.default for key in keys}
    assert defaults["glo.schedule.kind"] == "halving"
    assert defaults["sampler.schedule.kind"] == (
        "constant (imle, rs-imle, adaptive-imle); cosine (ot, flow, drift, coupling, ar)"
    )
    assert defaults["sampler.candidates"] == "2.0"
    assert defaults["glo.epochs"] == "required"
    assert defaults["data.max_rows"] == "empty"


def test_the_schema_refuses_unknown_keys():
    assert Config.model_json_schema()["additionalProperties"] is False


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=2024-11-25", "2024-11-25"),
        ("name=0012", "0012"),
        ("name=on", "on"),
        ("name=7", "7"),
        ("name='7'", "7"),
        ("data.url=12:30:45", "12:30:45"),
        ("data.url=a b #c", "a b #c"),
        ("data.url=[x", "[x"),
        ("tracking.experiment=2024-11-25", "2024-11-25"),
        ("tracking.experiment=null", "null"),
        ("checkpoint.url=null", None),
        ("checkpoint.url=", None),
        ("glo.epochs=0012", 12),
        ("glo.latent_lr=1e-3", 0.001),
        ("generator.batch_norm=off", False),
        ("loss.taps=[relu1_2]", ("relu1_2",)),
        ("cluster.workers=2", 2),
    ],
)
def test_an_override_is_what_was_typed_where_its_key_takes_text(override: str, value: object):
    """YAML makes a date of 2024-11-25, 10 of 0012, 45045 of 12:30:45 and a truth of `on`."""
    found: object = load("digits", [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("text", ["1e2", "on", "12:30", "2024-11-25"])
def test_a_value_that_is_no_number_is_shown_as_typed(text: str):
    with pytest.raises(UserError, match=f"glo.epochs='{text}' is not possible"):
        load("digits", [f"glo.epochs={text}"])


def test_dates_and_leading_zeros_of_a_file_stay_text(tmp_path: Path):
    recipe = tmp_path / "x.yaml"
    changes = SMALL | {"tracking": {"experiment": "EXPERIMENT"}, "name": "NAME"}
    recipe.write_text(yaml.safe_dump(changes).replace("NAME", "2024-11-25").replace("EXPERIMENT", "0012"))
    config = load(recipe)
    assert (config.name, config.tracking.experiment) == ("2024-11-25", "0012")
    recipe.write_text(yaml.safe_dump(changes).replace("NAME", "12"))
    with pytest.raises(UserError, match="name=12 is not possible: input should be text; put quotes around it"):
        load(recipe)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('"x\\0"', r"'x\\x00' is not possible: no text may hold a NUL"),
        ('"\\ud800"', "not UTF-8"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_text_that_no_file_or_address_can_hold_is_refused(text: str, reason: str):
    """YAML writes a NUL character as \\0, half a character as \\ud800; the shell gives bytes as they are."""
    assert re.search(f"data.url=.*{reason}", refusal(f"data.url={text}"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [("~/data", "~/data: this user has no home folder; set HOME"), ("~nemo/data", "~nemo/data: there is no user nemo")],
)
def test_a_home_folder_that_is_not_known_is_named(given: str, reason: str, monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("pwd.getpwnam", unknown)
    with pytest.raises(UserError, match=reason):
        absolute(given)
