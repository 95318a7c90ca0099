"""Protects a study of days: a damaged study.yaml or config.yaml is written anew where the trials, or a copy, say that
the study is the same; another study never gets into its folder, and what to do is said in one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from glann.config.run import load
from glann.errors import UserError
from glann.reports.run_folder import CONFIG, read_config, write_config
from glann.trainers.run.mirror import RunMirror
from glann.tuning.driver import of_study
from glann.tuning.folder import is_study, refuse_other_study, saved_study
from glann.tuning.ledger import Ledger
from glann.tuning.study import FILE, StudyConfig
from study_folder import fill_study, make_study

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "cut at the end": lambda data: data[:-3],
    "a list": lambda data: b"[]\n",
    "null": lambda data: b"null\n",
    "a number": lambda data: b"3\n",
    "binary": lambda data: bytes(range(256)) * 4,
    "too large": lambda data: b"# " + b"x" * (5 << 20) + b"\n" + data,
    "nested": lambda data: b"[" * 100_000,
    "wrong keys": lambda data: b"a: 1\n",
}
CLASSES = ("Config", "State", "Section", "NoneType", "BaseModel", "pydantic", "Traceback")
OTHERS: list[tuple[dict[str, Any], str]] = [
    (
        {"overrides": {"glo.epochs": 5, "data.max_rows": 1500, "sampler.kind": "imle"}},
        "of trial 0, glo.epochs is 12 there and 5 here",
    ),
    ({"metric": "l1"}, "the value of trial 0 is not its l1"),
    ({"space": {"glo.latent_lr": {"log_uniform": [0.005, 0.1]}}}, "which this space does not"),
    ({"space": {"glo.latent_lr": {"log_uniform": [1e-9, 1e-8]}}}, "which this space does not"),
]


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    """A study with trials that have ended and some that have not."""
    study = make_study(tmp_path / "studies").with_absolute_paths()
    (study.folder / FILE).write_text(study.to_yaml())
    fill_study(study)
    for trial in Ledger(study.folder).trials:  # as `Part.config` makes them
        write_config(study.run_dir(trial.number), study.trial(trial.number, trial.params).with_absolute_paths())
    write_config(study.folder, study.base())
    return study


def changed(study: StudyConfig, **changes: Any) -> StudyConfig:
    return StudyConfig.model_validate(study.model_dump(exclude_unset=True) | changes)


def one_line(error: UserError) -> str:
    text = str(error)
    assert "\n" not in text
    assert not [name for name in CLASSES if name in text]
    return text


# three bytes less of a config.yaml leave one with the same meaning
LOST = [(name, how) for name in (FILE, CONFIG) for how in [*DAMAGE, "missing"]]
LOST.remove((CONFIG, "cut at the end"))


@pytest.mark.parametrize(("name", "how"), LOST)
def test_what_is_damaged_is_written_anew_where_the_trials_agree(study, name, how, caplog):
    path = study.folder / name
    before = path.read_bytes()
    path.unlink() if how == "missing" else path.write_bytes(DAMAGE[how](before))
    assert is_study(study.folder)
    with caplog.at_level(logging.WARNING):
        refuse_other_study(study, study.base())
    assert path.read_bytes() == before
    assert f"{path} was damaged or missing and is written anew: " in caplog.text
    assert saved_study(study.folder) == study
    assert read_config(study.folder) == study.base()


@pytest.mark.parametrize("how", [*DAMAGE, "missing"])
@pytest.mark.parametrize(("changes", "message"), OTHERS)
def test_it_is_not_taken_over_by_another_study(study, how, changes, message):
    path = study.folder / FILE
    path.unlink() if how == "missing" else path.write_bytes(DAMAGE[how](path.read_bytes()))
    left = path.read_bytes() if path.exists() else None
    with pytest.raises(UserError, match=f"{study.folder} holds another study: ") as error:
        refuse_other_study(changed(study, **changes), changed(study, **changes).base())
    assert message in one_line(error.value)
    assert (path.read_bytes() if path.exists() else None) == left


@pytest.mark.parametrize("how", DAMAGE)
def test_where_no_trial_says_so_it_is_refused_with_what_to_do(study, how):
    path = study.folder / FILE
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    for number in range(12):
        (study.run_dir(number) / CONFIG).write_bytes(b"")
    with pytest.raises(UserError) as error:
        refuse_other_study(study, study.base())
    message = one_line(error.value)
    assert message.startswith(f"{path} is damaged, and no trial")
    assert message.endswith(f"restore {FILE}, or remove it if this command's study is the one")
    path.unlink()  # as it says
    refuse_other_study(study, study.base())


@pytest.mark.parametrize("how", DAMAGE)
def test_a_study_without_trials_has_nothing_to_lose(tmp_path, how):
    study = make_study(tmp_path / "studies").with_absolute_paths()
    path = study.folder / FILE
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    refuse_other_study(study, study.base())


@pytest.mark.parametrize("how", DAMAGE)
def test_a_copy_beside_the_checkpoints_decides(tmp_path, how):
    """Of what trials say nothing about as well, such as the scheduler."""
    here = {"data.max_rows": 1500, "sampler.kind": "imle", "checkpoint.url": str(tmp_path / "store")}
    study = make_study(tmp_path / "studies", overrides=here, scheduler={"grace": 2}).with_absolute_paths()
    (study.folder / FILE).write_text(study.to_yaml())
    fill_study(study)
    write_config(study.folder, study.base())
    RunMirror(study.base(), of_study).close(pytest.fail)
    path = study.folder / FILE
    before = path.read_bytes()
    path.write_bytes(DAMAGE[how](before))
    other = changed(study, scheduler={"grace": 1})
    with pytest.raises(UserError, match="holds another study: scheduler is "):
        refuse_other_study(other, other.base())
    refuse_other_study(study, study.base())
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", DAMAGE)
def test_a_report_names_what_is_damaged(study, how):
    path = study.folder / FILE
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    with pytest.raises(UserError, match=f"{path} is damaged: ") as error:
        saved_study(study.folder)
    assert one_line(error.value).endswith("the same `glann tune` writes it anew where the trials agree")


def test_the_values_of_a_population_may_have_changed_on_the_way(tmp_path):
    space = {"glo.latent_lr": {"log_uniform": [0.005, 0.1]}}
    study = make_study(tmp_path / "studies", space=space, search={"kind": "population"}).with_absolute_paths()
    ledger = Ledger(study.folder)
    trial = ledger.start({"glo.latent_lr": 0.01})
    ledger.close()
    study.run_dir(trial.number).mkdir(parents=True)
    config = study.trial(trial.number, {"glo.latent_lr": 0.2}).with_absolute_paths()
    write_config(study.run_dir(trial.number), config)
    write_config(study.folder, study.base())
    (study.folder / FILE).write_bytes(b"")
    refuse_other_study(study, study.base())
    assert saved_study(study.folder) == study


def test_the_run_whose_stage_one_is_shared_is_no_trial_of_the_study(tmp_path):
    first = load("digits", ["name=first", f"runs_dir={tmp_path}"])
    first.run_dir.mkdir()
    write_config(first.run_dir, first)
    (first.run_dir / "summary.json").write_text(json.dumps({"metrics": {}}))
    space = {"imle.noise_dim": {"integer": [8, 32]}}
    given = {"recipe": None, "stage_one": str(first.run_dir), "overrides": {}, "space": space}
    study = make_study(tmp_path / "studies", **given).with_absolute_paths()
    ledger = Ledger(study.folder)
    ledger.start({})
    ledger.close()
    write_config(study.folder, study.base())
    (study.folder / FILE).write_bytes(b"")
    with pytest.raises(UserError, match=r"no trial in .* says which study it is"):
        refuse_other_study(study, study.base())
