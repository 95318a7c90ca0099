"""The main job from the command line: it ends with everything a user needs, and no interruption changes its result."""

from __future__ import annotations

import json
import os
import signal

import mlflow
import numpy as np
import pytest
import yaml
from glann.cluster.checkpoints import reader, retention
from glann.config.sections import S3Config
from glann.storage.open import open_store
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def undisturbed(glann):
    done = glann.train("name=undisturbed", "tracking.register_as=small-digits")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def final(glann, run):
    """Every array of the last checkpoint of a run, and its rows in order."""
    store = open_store(str(glann.folder / "runs" / run / "checkpoints"), S3Config())
    step = retention.latest(store)
    arrays = {}
    for name in reader.names(store, step):
        arrays |= {f"{name}/{key}": t.numpy() for key, t in reader.load_tensors(store, step, name).items()}
    return arrays | reader.load_rows(store, step, range(600)), reader.load_state(store, step)


def last_loss(glann, run, stage):
    return [entry["loss"] for entry in glann.entries(run) if entry["stage"] == stage][-1]


def test_a_run_leaves_all_that_is_promised(glann, undisturbed):
    run = glann.folder / "runs" / "undisturbed"
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "MODEL_CARD.md"):
        assert (run / name).stat().st_size > 100, name
    for name in ("samples", "interpolations", "nearest", "glo-epoch-012-reconstructions", "imle-epoch-012-samples"):
        assert (run / "images" / f"{name}.png").stat().st_size > 100, name
    assert {"generator.safetensors", "sampler-imle.safetensors"} <= {path.name for path in (run / "model").iterdir()}
    assert yaml.safe_load((run / "config.yaml").read_text())["glo"]["epochs"] == 12
    stages = [(entry["stage"], entry.get("epoch")) for entry in glann.entries("undisturbed")]
    assert [("glo", n) for n in range(1, 13)] == [stage for stage in stages if stage[0] == "glo"]
    assert [("imle", n) for n in range(1, 13)] == [stage for stage in stages if stage[0] == "imle"]
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert metrics["fd_squeezenet"] > 0
    assert metrics["gaussian/fd_squeezenet"] > 0
    assert "done" in undisturbed.stdout
    assert "report.html" in undisturbed.stdout
    assert not (glann.folder / "runs" / "undisturbed" / "checkpoints" / "step-000001").exists()


def test_the_loss_falls(glann, undisturbed):
    for stage in ("glo", "imle"):
        losses = [entry["loss"] for entry in glann.entries("undisturbed") if entry["stage"] == stage]
        assert losses[-1] < 0.8 * losses[0], stage


def test_the_same_command_again_says_so_and_ends_at_once(glann, undisturbed):
    again = glann.train("name=undisturbed", "tracking.register_as=small-digits")
    assert again.returncode == 0
    assert "finished already" in again.stdout


def test_mlflow_has_the_run_and_the_registered_model_draws(glann, undisturbed, monkeypatch):
    uri = f"sqlite:///{glann.folder / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("glann")
    [run] = [
        run
        for run in client.search_runs([experiment.experiment_id])
        if run.data.tags["mlflow.runName"] == "undisturbed"
    ]
    assert run.info.status == "FINISHED"
    assert run.data.params["glo.epochs"] == "12"
    assert run.data.tags["glann.fingerprint"]
    losses = client.get_metric_history(run.info.run_id, "glo/loss")
    assert len(losses) == 12
    assert [str(version.version) for version in client.search_model_versions("name='small-digits'")] == ["1"]
    model = mlflow.pyfunc.load_model("models:/small-digits/1")
    images = model.predict({"n": 16, "seed": 0, "truncation": 1.0})
    assert images.dtype == np.uint8
    assert images.shape == (16, 28, 28, 1)
    assert np.array_equal(images, model.predict({"n": 16, "seed": 0, "truncation": 1.0}))


def test_samples_come_from_a_run_folder_and_from_the_registry(glann, undisturbed):
    assert glann("sample", "runs/undisturbed", "--n", "9", "--out", "a.npz").returncode == 0
    assert glann("sample", "models:/small-digits/1", "--n", "9", "--out", "b.npz").returncode == 0
    a, b = np.load(glann.folder / "a.npz")["images"], np.load(glann.folder / "b.npz")["images"]
    assert a.shape == (9, 28, 28, 1)
    assert np.array_equal(a, b)
    assert glann("interpolate", "runs/undisturbed", "--out", "between.png").returncode == 0
    assert (glann.folder / "between.png").stat().st_size > 100
    evaluated = glann("evaluate", "runs/undisturbed", "--samples", "50", "--extractor", "squeezenet")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "fd_squeezenet" in evaluated.stdout


def test_interrupted_and_killed_it_ends_bit_for_bit_like_an_undisturbed_run(glann, undisturbed):
    """It also measures while it trains, which the other run does not."""
    measuring = ("evaluation.every_epochs=4", "evaluation.interim_samples=60", "checkpoint.keep=1")
    command = ("train", "digits", *glann.small, "name=disturbed", *measuring)
    process = glann.start(*command)
    glann.wait_for_epoch(process, "disturbed", "glo", 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    assert "the same command resumes" in out + err

    process = glann.start(*command)
    glann.wait_for_epoch(process, "disturbed", "imle", 1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (glann.folder / "runs" / "disturbed" / "config.yaml").write_bytes(b"")  # as a disk leaves it that loses its power

    done = glann(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from the checkpoint" in done.stdout
    a, b = final(glann, "undisturbed"), final(glann, "disturbed")
    assert a[0].keys() == b[0].keys()
    different = [name for name in a[0] if not np.array_equal(a[0][name], b[0][name])]
    assert not different
    assert a[1]["position"] == b[1]["position"]
    packaged = [
        load_file(glann.folder / "runs" / run / "model" / "sampler-imle.safetensors")
        for run in ("undisturbed", "disturbed")
    ]
    assert all(np.array_equal(packaged[0][name], packaged[1][name]) for name in packaged[0])
    check_best(glann, "disturbed")


def check_best(glann, run):
    """The best checkpoint of a run that has kept it and the last one: named everywhere, and drawn from."""
    checkpoints = glann.folder / "runs" / run / "checkpoints"
    best = json.loads((checkpoints / "best.json").read_text())
    measured = {e["step"]: e for e in glann.entries(run) if e["stage"].endswith("/measured")}
    assert measured[max(measured)]["best_step"] == best["step"]
    if found := measured.get(best["step"]):  # a kill may come between best.json and the journal
        assert best["value"] == found.get("fd_squeezenet", found.get("gaussian/fd_squeezenet"))
    kept = {int(path.name[5:]) for path in checkpoints.glob("step-*")}
    assert kept == {best["step"], max(measured)}
    status = json.loads((checkpoints.parent / "status.json").read_text())
    assert status["best"] == {"metric": "fd_squeezenet", "value": best["value"], "step": best["step"]}
    drawn = {}
    for which in ("best", "last", None):
        chosen = () if which is None else ("--checkpoint", which)
        done = glann("sample", f"runs/{run}", "--n", "9", "--out", f"{which}.npz", *chosen)
        assert done.returncode == 0, done.stderr
        drawn[which] = np.load(glann.folder / f"{which}.npz")["images"]
    assert np.array_equal(drawn["last"], drawn[None]), "the model is packaged from the last"
    assert np.array_equal(drawn["best"], drawn["last"]) == (best["step"] == max(measured))


def test_at_another_number_of_workers_every_row_is_visited_exactly_once_an_epoch(glann, undisturbed):
    process = glann.start("train", "digits", *glann.small, "name=moved")
    glann.wait_for_epoch(process, "moved", "glo", 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    done = glann.train("name=moved", "cluster.workers=1")
    assert done.returncode == 0, done.stdout + done.stderr
    arrays, _ = final(glann, "moved")
    assert np.array_equal(arrays["steps"], np.full(600, 12))
    assert np.allclose(np.linalg.norm(arrays["z"], axis=1), 1, atol=1e-5)
    for stage in ("glo", "imle"):
        assert last_loss(glann, "moved", stage) == pytest.approx(last_loss(glann, "undisturbed", stage), rel=0.1)


def test_another_configuration_in_the_same_folder_is_refused(glann, undisturbed):
    refused = glann.train("name=undisturbed", "glo.latent_lr=0.02")
    assert refused.returncode == 2
    assert "glo.latent_lr is" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_what_was_damaged_on_disk_is_written_anew_by_the_same_command(glann):
    short = ("glo.epochs=2", "imle.epochs=2", "tracking.enabled=false")
    command = ("train", "digits", *glann.small, "name=mended", *short)
    assert glann(*command).returncode == 0
    run = glann.folder / "runs" / "mended"
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "model/model.json")}
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    for name in ("config.yaml", "summary.json", "model/model.json"):
        (run / name).write_bytes((run / name).read_bytes()[:40])
    refused = glann(*command, "glo.latent_lr=0.02")
    assert refused.returncode == 2
    assert "glo.latent_lr is" in refused.stderr
    done = glann(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: (run / name).read_bytes() for name in before} == before
    assert json.loads((run / "summary.json").read_text())["metrics"] == metrics
    assert [entry["epoch"] for entry in glann.entries("mended") if entry["stage"] == "glo"] == [1, 2]
    assert "finished already" in glann(*command).stdout
