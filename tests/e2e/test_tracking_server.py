"""Tracking against a real `mlflow server` on PostgreSQL and S3: nothing is lost, doubled or waited for."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from glann.config.run import Config
from glann.inference.package import export_model
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.reports.run_folder import TRACKING
from glann.samplers.gaussian import gaussian
from glann.tracking import connection, outbox
from glann.tracking.runs import TrackedRun
from glann.tracking.source import load_model
from mlflow import MlflowClient
from PIL import Image
from tracking_server import BUCKET, TrackingServer, missing, tracking_server

pytestmark = pytest.mark.matrix

FOREVER, PATIENT_S = 10**9, 300.0
WRITER = """
import sys, time
from pathlib import Path
from glann.config.run import load
from glann.tracking import connection
from glann.tracking.runs import TrackedRun
from glann.samplers.gaussian import gaussian

connection.START_TIMEOUT_S = 300
folder = Path(sys.argv[1])
run = TrackedRun.open(load(folder.with_suffix(".yaml")), folder)
step = 0
while True:
    run.log_metrics({"stage": "glo", "loss": float(step)}, step)
    step += 1
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with tracking_server(tmp_path_factory.mktemp("tracking")) as server:
        yield server


@pytest.fixture
def server(served, monkeypatch) -> TrackingServer:
    monkeypatch.setattr(outbox, "POLL_S", 0.2)
    monkeypatch.setattr(outbox, "PATIENCE_S", PATIENT_S)  # a busy machine is not what is tested
    monkeypatch.setattr(connection, "START_TIMEOUT_S", PATIENT_S)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", served.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # the server has them, a client needs none
        monkeypatch.delenv(name, raising=False)
    served.proxy.clear()
    return served


def make_config(server, name, **tracking):
    return Config.model_validate(
        {
            "name": name,
            "data": {"url": "data", "resolution": 28, "channels": 1},
            "generator": {"kind": "infogan", "latent_dim": 6, "width": 4},
            "glo": {"epochs": 1},
            "imle": {"noise_dim": 5, "hidden_dim": 8},
            "tracking": {"uri": server.url, **tracking},
        }
    )


def package(folder: Path, config: Config) -> Path:
    torch.manual_seed(1)
    generator, mapping = build_generator(config.generator, 28, 1), build_mapping(config.sampler, 6)
    return export_model(
        folder, config, generator.state_dict(), mapping.state_dict(), gaussian(torch.randn(20, 6)), 20, "f00d"
    )


def grid(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(path)
    return path


def history(server, run_id, key="glo/loss"):
    return sorted((m.step, m.value) for m in MlflowClient(server.url).get_metric_history(run_id, key))


def climb(steps):
    return [(step, float(step)) for step in range(steps)]


def wait_until(condition, what, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_study_and_its_trial_with_metrics_images_and_model_are_found_by_others(server, tmp_path):
    study = TrackedRun.open(make_config(server, "study"), tmp_path / "study")
    config = make_config(server, "trial", register_as="digits")
    run = TrackedRun.open(config, tmp_path / "trial", {"glann.data_fingerprint": "f00d"}, parent_run_id=study.run_id)
    for step in range(50):
        run.log_metrics({"stage": "glo", "epoch": 1, "loss": float(step)}, step)
    picture = grid(tmp_path / "trial" / "images" / "samples.png")
    run.log_image(picture)
    folder = package(tmp_path / "trial" / "model", config)
    run.log_model(folder)
    run.finish(timeout_s=PATIENT_S)
    study.finish(timeout_s=PATIENT_S)

    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("glann")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{study.run_id}'")
    assert [child.info.run_id for child in children] == [run.run_id]
    assert client.get_run(study.run_id).info.run_name == "study"
    (child,) = children
    assert (child.info.run_name, child.info.status) == ("trial", "FINISHED")
    assert child.data.params["generator.latent_dim"] == "6"
    assert child.data.tags["glann.data_fingerprint"] == "f00d"
    assert history(server, run.run_id) == climb(50)
    assert [file.path for file in client.list_artifacts(run.run_id, "images")] == ["images/samples.png"]

    objects = server.objects()
    (key,) = [key for key in objects if key.endswith(f"{run.run_id}/artifacts/images/samples.png")]
    assert server.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == picture.read_bytes()
    packaged = {path.name: path.stat().st_size for path in folder.iterdir()}
    in_s3 = {Path(key).name: size for key, size in objects.items() if "/models/" in key}
    assert packaged.items() <= in_s3.items()

    assert run.model is not None
    assert (run.model.uri, run.model.version) == ("models:/digits@challenger", "1")
    expected = load_model(folder).sample(3, seed=5)
    np.testing.assert_array_equal(load_model("models:/digits@challenger").sample(3, seed=5), expected)
    served = mlflow.pyfunc.load_model("models:/digits@challenger")
    np.testing.assert_array_equal(served.predict({"n": 3, "seed": 5, "truncation": 1.0}), expected)


def test_a_killed_run_goes_on_as_the_same_run_without_a_doubled_metric(server, tmp_path):
    config, folder = make_config(server, "killed"), tmp_path / "killed"
    folder.with_suffix(".yaml").write_text(config.to_yaml())
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stderr=subprocess.PIPE, text=True)

    def state():
        assert process.poll() is None, process.communicate()
        return outbox.OutboxState.load(folder) if (folder / TRACKING).exists() else None

    wait_until(lambda: (held := state()) is not None and held.sent_bytes > 0, "no metric arrived", PATIENT_S)
    time.sleep(1)
    process.kill()
    process.communicate()
    first = outbox.OutboxState.load(folder)
    written = len((folder / "metrics.jsonl").read_bytes().splitlines())
    run = TrackedRun.open(config, folder)
    for step in range(written, written + 20):
        run.log_metrics({"stage": "glo", "loss": float(step)}, step)
    run.finish(timeout_s=PATIENT_S)
    assert run.run_id == first.run_id
    assert history(server, run.run_id) == climb(written + 20)
    client = MlflowClient(server.url)
    found = client.search_runs([client.get_experiment_by_name("glann").experiment_id], "attributes.run_name = 'killed'")
    assert len(found) == 1


def test_a_big_file_gets_through_in_parts(server, tmp_path):
    run = TrackedRun.open(make_config(server, "big"), tmp_path)
    data = np.random.default_rng(1).bytes(60 << 20)
    (tmp_path / "big.bin").write_bytes(data)
    run.log_artifact(tmp_path / "big.bin", "files")
    run.finish(timeout_s=PATIENT_S)
    (key,) = [key for key in server.objects() if key.endswith(f"{run.run_id}/artifacts/files/big.bin")]
    stored = server.s3.head_object(Bucket=BUCKET, Key=key)
    assert stored["ContentLength"] == len(data)
    assert "-" in stored["ETag"]  # S3's mark of an object that came in parts
    back = MlflowClient(server.url).download_artifacts(run.run_id, "files/big.bin", str(tmp_path))
    assert hashlib.sha256(Path(back).read_bytes()).digest() == hashlib.sha256(data).digest()


def test_a_slow_server_and_one_that_is_gone_hold_nothing_up_and_get_everything(server, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "glann.tracking")
    server.proxy.inject("stall", FOREVER, 2.0)
    run = TrackedRun.open(make_config(server, "slow"), tmp_path)
    before = server.requests("runs/log-batch")

    def log_500(start):
        began = time.monotonic()
        for step in range(start, start + 500):
            run.log_metrics({"stage": "glo", "loss": float(step)}, step)
        run.log_image(grid(tmp_path / "images" / f"at-{start}.png"))
        assert time.monotonic() - began < 5

    log_500(0)
    wait_until(lambda: not run._outbox.waiting(), "a slow server does not get it")
    assert 1 <= server.requests("runs/log-batch") - before <= 20
    assert not caplog.records

    server.proxy.clear()
    gone = server.proxy.inject("reset", FOREVER)
    log_500(500)
    wait_until(lambda: "does not accept metrics" in caplog.text, "the refusal was not logged")
    server.kill()
    log_500(1000)
    server.proxy.clear()  # the proxy is there and says 502, the server is not
    met = server.requests("runs/log-batch")
    wait_until(lambda: server.requests("runs/log-batch") > met, "it is not tried again", 90)
    server.start()
    log_500(1500)
    run.finish(timeout_s=PATIENT_S)

    assert gone.times < FOREVER
    assert caplog.text.count("does not accept metrics") == 1
    assert "again after" in caplog.text
    assert history(server, run.run_id) == climb(2000)
    assert MlflowClient(server.url).get_run(run.run_id).info.status == "FINISHED"
    pictures = [file.path for file in MlflowClient(server.url).list_artifacts(run.run_id, "images")]
    assert sorted(pictures) == sorted(f"images/at-{start}.png" for start in (0, 500, 1000, 1500))


@pytest.mark.parametrize("kind", ["reset", "lost", "truncate"])
def test_a_model_is_logged_and_registered_once_however_often_connections_break(server, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(outbox, "MAX_DELAY_S", 0.2)
    config = make_config(server, kind, register_as=kind)
    folder = package(tmp_path / "model", config)
    met = set()

    def first_of_its_kind(method, path):
        """Whether it makes or changes something, and is the first that does this."""
        step = method, path.partition("?")[0].rpartition("/m-")[2][-40:]
        if method == "GET" or path.endswith(("/search", "/log-batch")) or step in met:
            return False
        met.add(step)
        return True

    fault = server.proxy.inject(kind, FOREVER, wanted=first_of_its_kind)
    run = TrackedRun.open(config, tmp_path)
    run.log_model(folder)
    run.finish(timeout_s=PATIENT_S)
    server.proxy.clear()
    assert FOREVER - fault.times > 8
    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("glann").experiment_id
    (stored,) = client.search_runs([experiment], f"attributes.run_name = '{kind}'")
    assert (stored.info.run_id, stored.info.status) == (run.run_id, "FINISHED")
    (logged,) = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run.run_id}'")
    (version,) = client.search_model_versions(f"name = '{kind}'")
    assert version.source == logged.artifact_location
    assert [output.model_id for output in stored.outputs.model_outputs] == [logged.model_id]
    np.testing.assert_array_equal(load_model(f"models:/{kind}@challenger").sample(2), load_model(folder).sample(2))
