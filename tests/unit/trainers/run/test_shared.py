"""Results come home: what a job names at its end, what a finished run says, and the copy that a user fetches."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
from glann.cli import main as cli
from glann.config.run import Config, load
from glann.errors import UserError
from glann.reports.run_folder import write_config
from glann.storage.open import open_store
from glann.trainers.run import shared
from glann.trainers.run.finish import summary_of
from glann.trainers.run.mirror import RunMirror
from rich.console import Console

LINK = "http://127.0.0.1:5000/#/experiments/1/runs/abc?workflowType=machine_learning"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run on the head of a cluster; `bucket` stands for shared storage."""
    given = ["name=faces", f"runs_dir={tmp_path}/head/runs", f"checkpoint.url={tmp_path}/bucket"]
    return load("digits", [*given, "data.url=/data/digits", "tracking.uri=http://127.0.0.1:5000"])


def finish_run(config: Config, ended: bool = True) -> None:
    """The run folder as a finished run leaves it, and its copy in shared storage."""
    run = config.run_dir
    for name in ("images", "model"):
        (run / name).mkdir(parents=True)
    write_config(run, config)
    weights = b"weights" * 1000
    entry = {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    (run / "model" / "generator.safetensors").write_bytes(weights)
    (run / "model" / "model.json").write_text(json.dumps({"format": 2, "files": {"generator.safetensors": entry}}))
    (run / "images" / "samples.png").write_bytes(b"a picture")
    (run / "report.html").write_text("a report")
    (run / "MODEL_CARD.md").write_text("a card")
    (run / "metrics.jsonl").write_text('{"stage":"glo","epoch":1}\n')
    tracked = {"key": "k", "uri": "http://127.0.0.1:5000", "run_id": "abc", "experiment": "1", "ended": ended}
    (run / "tracking.json").write_text(json.dumps(tracked))
    summary = {"rows": 600, "metrics": {"psnr": 20.0}, "timings": {"train_s": 60}, "made": {"mlflow": LINK}}
    (run / "summary.json").write_text(json.dumps(summary))
    RunMirror(config).close(pytest.fail)


def store_of(config: Config):
    return open_store(config.checkpoint_url.rpartition("/")[0])


def printed_lines(config: Config) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=40).print(summary_of(config), soft_wrap=True)
    return [line.strip() for line in out.getvalue().splitlines()]


def test_a_job_ends_with_addresses_and_names_no_path_of_the_head(config, tmp_path, monkeypatch):
    finish_run(config)
    assert any(str(config.run_dir) in line for line in printed_lines(config)), "at home paths are right"
    monkeypatch.setenv("GLANN_JOB", "faces")
    lines = printed_lines(config)
    url = f"{tmp_path}/bucket/faces"
    assert lines[lines.index("look at") + 1 :] == [
        LINK,
        f"{url}/report.html",
        f"{url}/images/samples.png",
        "try next",
        f"glann jobs fetch faces --runs {tmp_path}/bucket",
        f"glann sample {url} --n 100 --seed 1 --out more.png",
    ]
    assert not any("/head/" in line for line in lines)


def test_a_job_that_tracks_into_a_file_of_the_head_does_not_name_it(config, monkeypatch):
    finish_run(config)
    monkeypatch.setenv("GLANN_JOB", "faces")
    there = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "sqlite:////head/m.db"})})
    assert not any("m.db" in line or "mlflow" in line for line in printed_lines(there))


def test_the_start_script_of_a_job_says_that_it_is_one():
    from glann.cluster.jobs import shipping

    assert f'export {shipping.JOB_VARIABLE}="$1"' in shipping.START_SCRIPT


def submit(config: Config, *more: str) -> int | None:
    given = [f"checkpoint.url={config.checkpoint.url}", "data.url=/data/digits", "tracking.uri=http://127.0.0.1:5000"]
    with pytest.raises(SystemExit) as caught:
        # nothing listens there: a finished run is found finished without a cluster
        cli.main(["submit", "digits", *given, "--name", "faces", "--address", "http://127.0.0.1:1", *more])
    return caught.value.code


def test_submitting_a_finished_run_says_so_at_once(config, tmp_path, capsys):
    finish_run(config)
    assert not submit(config)
    told = capsys.readouterr().out
    assert told.startswith("faces has finished; nothing was started\nlook at\n")
    assert LINK in told
    assert f"glann jobs fetch faces --runs {tmp_path}/bucket" in told
    assert "/head/" not in told


def test_a_finished_run_that_mlflow_has_only_a_part_of_is_submitted(config, capsys):
    finish_run(config, ended=False)
    assert submit(config) == 1  # there is no cluster
    out, err = capsys.readouterr()
    assert "faces has finished; a job sends MLflow the outstanding entries" in out
    assert "no Ray dashboard answers" in err


def test_another_run_of_that_name_is_refused_before_anything_is_sent(config, capsys):
    finish_run(config)
    assert submit(config, "glo.latent_lr=0.5") == 2
    assert "holds a run of another configuration: glo.latent_lr is " in capsys.readouterr().err
    (Path(config.checkpoint.url or "") / "faces" / "study.yaml").write_text("name: faces\n")
    assert submit(config) == 2
    assert "holds a study of that name" in capsys.readouterr().err


def test_a_run_that_has_not_finished_is_submitted(config, capsys):
    assert shared.finished(config) is None
    finish_run(config)
    (Path(config.checkpoint.url or "") / "faces" / "report.html").unlink()
    assert shared.finished(config) is None


def test_a_run_that_was_packaged_from_another_checkpoint_is_submitted(config):
    finish_run(config)
    chosen = {"checkpoint": {"use": "best"}, "evaluation": {"every_epochs": 2}}
    best = config.model_copy(update={key: getattr(config, key).model_copy(update=new) for key, new in chosen.items()})
    assert shared.finished(config) is not None
    assert shared.finished(best) is None
    summary = Path(config.checkpoint.url or "") / "faces" / "summary.json"
    summary.write_text("{")
    assert shared.finished(config) is None, "the driver finishes it anew"


def fetch(*words: str) -> int | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["jobs", "fetch", "faces", *words])
    return caught.value.code


def test_results_are_fetched_without_the_cluster_and_completed_by_the_same_command(
    config, tmp_path, capsys, monkeypatch
):
    finish_run(config)
    monkeypatch.chdir(tmp_path)
    words = ("--runs", config.checkpoint.url or "")
    assert not fetch(*words)
    home = tmp_path / "runs" / "faces"
    made = {path.relative_to(home): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    head = {path.relative_to(config.run_dir): path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    assert made == head
    (home / "config.yaml").unlink()
    (home / "model" / "generator.safetensors").unlink()
    capsys.readouterr()
    assert not fetch(*words)
    assert "copied 2 files" in capsys.readouterr().out
    assert (home / "model" / "generator.safetensors").read_bytes() == b"weights" * 1000


def test_a_file_that_differs_is_never_replaced_silently(config, tmp_path, capsys):
    finish_run(config)
    home, words = tmp_path / "mine", ("--runs", config.checkpoint.url or "")
    assert not fetch(str(home), *words)
    (home / "report.html").write_text("my notes")  # as many bytes
    (home / "model" / "generator.safetensors").write_bytes(b"Weights" * 1000)
    (home / "MODEL_CARD.md").unlink()
    assert fetch(str(home), *words) == 2
    told = capsys.readouterr().err
    assert "has other files than" in told
    assert "model/generator.safetensors, report.html; name another DEST" in told
    assert not (home / "MODEL_CARD.md").exists(), "nothing is copied then"
    assert not fetch(str(home), *words, "--overwrite")
    assert (home / "report.html").read_text() == "a report"
    assert (home / "model" / "generator.safetensors").read_bytes() == b"weights" * 1000


def test_a_run_that_still_trains_is_fetched_as_far_as_it_is(config, tmp_path, capsys):
    finish_run(config)
    (Path(config.checkpoint.url or "") / "faces" / "report.html").unlink()
    assert not fetch(str(tmp_path / "mine"), "--runs", config.checkpoint.url or "")
    assert "faces has not finished; this is what there is so far" in capsys.readouterr().err


def test_checkpoints_and_hidden_files_stay_where_they_are(config, tmp_path):
    finish_run(config)
    for key in ("checkpoints/step-000001/manifest.json", ".lock"):
        path = Path(config.checkpoint.url or "") / "faces" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert not fetch(str(tmp_path / "mine"), "--runs", config.checkpoint.url or "")
    assert not (tmp_path / "mine" / "checkpoints").exists()
    assert not (tmp_path / "mine" / ".lock").exists()


def test_a_name_that_is_not_there_is_told_in_one_line(config, tmp_path, capsys):
    with pytest.raises(UserError, match=r"holds no results of a run; check NAME and --runs"):
        shared.fetch(store_of(config), tmp_path / "mine")
    assert fetch("--address", "http://127.0.0.1:1") == 1
    assert "without the cluster: --runs URL, the checkpoint.url of the run" in capsys.readouterr().err


def test_a_copy_that_failed_at_the_end_is_completed_by_the_same_command(config):
    """The model is sent again only if the copy's is another one."""
    finish_run(config)
    copy = Path(config.checkpoint.url or "") / "faces"
    (copy / "summary.json").unlink()
    weights = copy / "model" / "generator.safetensors"
    before = weights.stat().st_mtime_ns
    RunMirror(config).complete(pytest.fail)
    assert (copy / "summary.json").exists()
    assert weights.stat().st_mtime_ns == before
    (copy / "model" / "model.json").write_text("{}")
    RunMirror(config).complete(pytest.fail)
    assert weights.stat().st_mtime_ns != before
