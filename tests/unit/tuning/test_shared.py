"""A submitted study: what travels, that the ledger outlives the head, and that no two commands run one study."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from glann.cli import main as cli
from glann.cluster.checkpoints.lease import RunTaken
from glann.cluster.jobs import shipping
from glann.config.run import load
from glann.errors import EnvironmentFault, UserError
from glann.reports.run_folder import write_config
from glann.storage.files import write_whole
from glann.trainers.run import local
from glann.trainers.run import shared as runs
from glann.trainers.run.hooks import Hooks
from glann.trainers.run.mirror import RunMirror, take_back
from glann.tuning import shared
from glann.tuning.driver import of_study
from glann.tuning.folder import refuse_other_study
from glann.tuning.ledger import Ledger, trials
from glann.tuning.load import is_study_file, load_study
from glann.tuning.report.leaderboard import command
from glann.tuning.study import FILE, StudyConfig
from rich.console import Console
from study_folder import fill_study

STUDY = """\
name: rates
recipe: {recipe}
overrides: {{data.url: /data/digits, glo.epochs: 12, checkpoint.url: {bucket}, tracking.uri: "http://127.0.0.1:5000"}}
space: {{glo.latent_lr: {{log_uniform: [0.005, 0.1]}}}}
metric: fd_squeezenet
budget: {{trials: 4}}
"""


def study_file(folder: Path, recipe: str = "digits") -> Path:
    path = folder / "mine.yaml"
    path.write_text(STUDY.format(recipe=recipe, bucket=folder / "bucket"))
    return path


def on_head(folder: Path, head: str = "head", recipe: str = "digits") -> StudyConfig:
    """The study as a job of a cluster has it; `bucket` stands for shared storage."""
    sent = shared.for_cluster(load_study(study_file(folder, recipe)))
    study = StudyConfig.model_validate(sent.model_dump() | {"studies_dir": str(folder / head / "studies")})
    return study.with_absolute_paths()


def begun(study: StudyConfig) -> RunMirror:
    """The folder of a study that has begun on a head."""
    study.folder.mkdir(parents=True)
    write_config(study.folder, study.base())
    write_whole(study.folder / FILE, study.to_yaml())
    mirror = RunMirror(study.base(), of_study)
    mirror.send(mirror.store)
    return mirror


def test_a_study_is_told_from_a_recipe(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(load("digits").to_yaml())
    assert is_study_file(str(study_file(tmp_path)))
    assert not is_study_file(str(recipe))
    assert not is_study_file("digits"), "a recipe has that name too"
    assert is_study_file("studies/digits")
    assert load_study("studies/digits") == load_study("digits")
    (tmp_path / "damaged.yaml").write_text("a: [")
    assert not is_study_file(str(tmp_path / "damaged.yaml"))


def test_the_command_line_changes_a_study_and_its_recipe(tmp_path: Path):
    given = ["budget.trials=7", "search.kind=random", "name=other", "glo.epochs=3", "data.url=s3://bucket/x"]
    study = load_study(study_file(tmp_path), overrides=given)
    assert (study.budget.trials, study.search.kind, study.name) == (7, "random", "other")
    assert (study.base().glo.epochs, study.base().data.url) == (3, "s3://bucket/x")
    with pytest.raises(UserError, match=r"unknown key budget.trails"):
        load_study(study_file(tmp_path), overrides=["budget.trails=7"])


def test_a_study_travels_with_its_recipe(tmp_path: Path):
    """The head has neither the file nor its folder; a recipe that ships with glann is there by name."""
    recipe = tmp_path / "my-recipe.yaml"
    recipe.write_text(load("digits", ["seed=5"]).to_yaml())
    local = load_study(study_file(tmp_path, str(recipe)))
    sent = shared.for_cluster(local)
    recipe.unlink()
    there = StudyConfig.model_validate(sent.model_dump())
    assert there.base().seed == 5
    assert there.base().cluster.address == "auto"
    assert str(tmp_path / "my-recipe") not in sent.to_yaml()
    assert shared.for_cluster(load_study(study_file(tmp_path))).recipe == "digits"
    taken = sent.model_copy(update={"recipe": None, "stage_one": "runs/digits"})
    with pytest.raises(UserError, match="stage_one=runs/digits is a path of this machine"):
        shared.for_cluster(taken)


def test_the_same_study_is_recognised_wherever_its_recipe_lies(tmp_path: Path):
    """The package, and with it a bundled recipe, is unpacked to another folder on every cluster."""
    study = on_head(tmp_path)
    begun(study)
    other = study.model_copy(update={"recipe": str(tmp_path / "elsewhere.yaml")})
    (tmp_path / "elsewhere.yaml").write_text(load("digits").to_yaml())
    refuse_other_study(other, other.base())
    (tmp_path / "elsewhere.yaml").write_text(load("digits", ["glo.batch_size=64"]).to_yaml())
    with pytest.raises(UserError, match=r"glo.batch_size is \d+ there and 64 here"):
        refuse_other_study(other, other.base())


def test_a_job_of_a_study_runs_tune_with_the_study_that_was_sent(tmp_path: Path):
    study = on_head(tmp_path)
    staged = shipping.stage_run(tmp_path, study.base(), study.to_yaml())
    assert sorted(path.name for path in staged.iterdir()) == ["start.sh", "study.yaml"]
    assert load_study(staged / "study.yaml") == study
    assert 'glann tune "$folder/study.yaml"' in (staged / "start.sh").read_text()
    assert shipping.digest(study.base(), study.to_yaml()) != shipping.digest(study.base())


def test_a_trial_is_in_shared_storage_before_it_starts(tmp_path: Path):
    """Otherwise a new head would start another trial of that number, whose checkpoints are of other values."""
    study = on_head(tmp_path)
    mirror = begun(study)
    with shared.held(study.base(), mirror, print) as share:
        ledger = Ledger(study.folder, share)
        ledger.start({})
        trial = ledger.start({"glo.latent_lr": 0.02})
        copy = tmp_path / "bucket" / "rates" / "trials.jsonl"
        assert copy.read_bytes() == ledger.path.read_bytes()
        ledger.end(trial, 3.0, state="failed", why="lost")
        assert copy.read_bytes() == ledger.path.read_bytes()


def test_storage_that_fails_stops_a_start_and_not_an_end(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def broken(path: Path) -> None:
        raise EnvironmentFault("S3 does not answer")

    study = on_head(tmp_path)
    begun(study)
    trial = Ledger(study.folder).start({})
    ledger = Ledger(study.folder, broken)
    ledger.end(trial, state="failed", why="lost")
    assert "was not copied to shared storage yet" in caplog.text
    with pytest.raises(EnvironmentFault):
        ledger.start({"glo.latent_lr": 0.02})


def test_two_heads_never_run_one_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("glann.cluster.checkpoints.lease.PATIENCE_S", 3.0)
    monkeypatch.setattr("glann.cluster.checkpoints.lease.RENEW_S", 0.2)
    one, other = on_head(tmp_path), on_head(tmp_path, "other-head")
    second = shared.held(other.base(), RunMirror(other.base(), of_study), print)
    with shared.held(one.base(), begun(one), print), pytest.raises(RunTaken), second:
        pytest.fail("the study is held")
    with shared.held(other.base(), RunMirror(other.base(), of_study), print):
        pass


def test_a_study_resumes_on_a_new_head_with_all_its_trials(tmp_path: Path):
    """Running trials are resumed from their checkpoints; of ended ones the report needs all but the model."""
    study = on_head(tmp_path)
    mirror = begun(study)
    fill_study(study, ["finished", "finished", "running"])
    for number in trials(study.folder):
        run = study.trial(number, trials(study.folder)[number].params)
        (run.run_dir / "model").mkdir()
        (run.run_dir / "model" / "generator.safetensors").write_bytes(b"weights")
        RunMirror(run).close(pytest.fail)
    mirror.close(pytest.fail)
    ended = trials(study.folder)
    shutil.rmtree(tmp_path / "head")
    new = on_head(tmp_path, "new-head")
    assert take_back(new.base())
    shared.catch_up(new, new.base())
    assert trials(new.folder) == ended
    assert [trial.ended for trial in ended.values()] == [True, True, False]
    assert (new.run_dir(1) / "images" / "samples.png").exists()
    assert (new.run_dir(2) / "metrics.jsonl").exists()
    assert not (new.run_dir(1) / "model").exists()


def test_a_head_that_was_overtaken_takes_what_the_other_one_added(tmp_path: Path):
    old = on_head(tmp_path)
    mirror = begun(old)
    Ledger(old.folder, mirror.send_now).start({})
    new = on_head(tmp_path, "new-head")
    take_back(new.base())
    added = Ledger(new.folder, RunMirror(new.base(), of_study).send_now).start({"glo.latent_lr": 0.02})
    with (old.folder / "trials.jsonl").open("a") as file:
        file.write('{"event":"star')  # it was killed while it wrote
    shared.catch_up(old, old.base())
    assert trials(old.folder)[1] == added
    Ledger(new.folder, RunMirror(new.base(), of_study).send_now).start({"glo.latent_lr": 0.03})
    Ledger(old.folder).start({"glo.latent_lr": 0.04})
    with pytest.raises(UserError, match="hold different trials: the study was continued in both"):
        shared.catch_up(old, old.base())


def finish_study(study: StudyConfig, states: tuple[str, ...] = ("finished",) * 4) -> None:
    mirror = begun(study)
    fill_study(study, list(states))
    (study.folder / "report.html").write_text("a report")
    mirror.close(pytest.fail)


def submit(folder: Path, *more: str) -> int | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["submit", str(folder / "mine.yaml"), "--address", "http://127.0.0.1:1", *more])
    return caught.value.code


def test_submitting_a_finished_study_says_so_at_once_and_one_with_trials_left_is_submitted(tmp_path: Path, capsys):
    finish_study(on_head(tmp_path))
    assert not submit(tmp_path)
    told = capsys.readouterr().out
    assert told.splitlines() == [
        "rates has finished; nothing was started",
        "look at",
        f"  {tmp_path}/bucket/rates/report.html",
        "try next",
        f"  glann jobs fetch rates --runs {tmp_path}/bucket",
        "  glann registry register studies/rates --as NAME",
    ]
    assert submit(tmp_path, "budget.trials=5") == 1  # there is no cluster
    assert submit(tmp_path, "glo.batch_size=64") == 2
    assert "holds a run of another configuration: glo.batch_size" in capsys.readouterr().err
    assert submit(tmp_path, "search.seed=3") == 2
    assert "holds another study: search is" in capsys.readouterr().err


def test_a_study_is_fetched_with_its_best_trial(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    study = on_head(tmp_path)
    finish_study(study)
    best = min(trials(study.folder).values(), key=lambda trial: trial.value)
    run = study.trial(best.number, best.params)
    (run.run_dir / "report.html").write_text("of the best")
    RunMirror(run).close(pytest.fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["jobs", "fetch", "rates", "--runs", str(tmp_path / "bucket")])
    assert not caught.value.code, capsys.readouterr().err
    assert (tmp_path / "studies" / "rates" / "report.html").read_text() == "a report"
    assert (tmp_path / "studies/rates/trials" / run.name / "report.html").read_text() == "of the best"


def test_what_a_job_prints_of_its_best_trial_works_on_the_users_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tmp_path / "my-recipe.yaml"
    recipe.write_text(load("digits").to_yaml())
    study = on_head(tmp_path, recipe=str(recipe))
    monkeypatch.setenv("GLANN_JOB", "rates")
    study.folder.mkdir(parents=True)
    trial = Ledger(study.folder).start({"glo.latent_lr": 0.02})
    said = command(study, trial)
    assert said == "glann submit studies/rates/trials/rates-0000/config.yaml name=rates-best runs_dir=runs"
    assert runs.is_job()


def test_a_trial_of_stage_two_alone_outlives_the_head_once_it_has_ended(tmp_path: Path, monkeypatch):
    """It has no checkpoints; what it has made is copied, and found finished by the next head."""
    study = on_head(tmp_path)
    study.folder.mkdir(parents=True)
    config = study.trial(1, {"glo.latent_lr": 0.02})
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})
    trained: list[str] = []

    def train(config, *_):
        trained.append(config.name)
        (config.run_dir / "report.html").write_text("a report")
        summary = {"rows": 600, "metrics": {"fd_squeezenet": 0.3}, "timings": {"train_s": 1}}
        (config.run_dir / "summary.json").write_text(json.dumps(summary))
        return summary["metrics"]

    monkeypatch.setattr(local, "_train", train)
    stage_one = SimpleNamespace(index=SimpleNamespace(fingerprint="f", resolution=28, channels=1), z_ND=[0])
    again = (config, Console(quiet=True), Hooks(), stage_one)
    assert local.train_second_stage(*again) == {"fd_squeezenet": 0.3}
    shutil.rmtree(tmp_path / "head")
    assert local.train_second_stage(*again) == {"fd_squeezenet": 0.3}
    assert trained == ["rates-0001"]
