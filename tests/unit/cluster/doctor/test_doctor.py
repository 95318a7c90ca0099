"""`glann doctor` finds what would otherwise fail after hours, with a remedy, and raises no false alarm."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from glann.cluster.doctor import checks as doctor
from glann.cluster.doctor.checks import Check
from glann.config.run import Config, load
from glann.datasets.pack import pack
from glann.storage.base import ObjectExists
from glann.tracking.doctor import tracking

UNREACHABLE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLANN_CACHE", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def packed(elsewhere: Path) -> Config:
    """A recipe with its data: six grey images in several shards."""
    rng = np.random.default_rng(0)
    np.savez(elsewhere / "images.npz", images=rng.integers(0, 256, (6, 28, 28), np.uint8))
    pack(str(elsewhere / "images.npz"), "data/x", resolution=28, channels=1, shard_size_mb=0.003)
    return load("digits", ["data.url=data/x", "data.source=null"])


def answers(*overrides: str) -> dict[str, Check]:
    config = load("digits", list(overrides))
    return {check.name: check for check in (*doctor.checks(config), *tracking(config))}


def test_this_machine_can_run_the_demo():
    found = answers()
    assert [check for check in found.values() if not check.ok] == []
    assert {"python", "torch", "ray", "deepspeed", "mlflow", "packages", "accelerators", "disk"} < set(found)
    assert "training will pack mnist-10k" in found["data"].found


def test_without_a_recipe_only_the_machine_is_looked_at():
    names = {check.name for check in doctor.checks()}
    assert not names & {"data", "checkpoints", "mlflow server"}


def test_a_doctor_changes_nothing(elsewhere: Path, packed: Config):
    before = sorted(elsewhere.rglob("*"))
    assert all(check.ok for check in doctor.checks(packed))
    assert sorted(elsewhere.rglob("*")) == before


def test_versions_outside_the_declared_ranges_are_bad(monkeypatch: pytest.MonkeyPatch):
    real = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.13" if name == "torch" else real(name))
    bad = [check for check in doctor.package_checks() if not check.ok]
    assert [check.name for check in bad] == ["torch"]
    assert "1.13 is outside >=2" in bad[0].found
    assert "pip install" in bad[0].remedy


def test_a_missing_package_is_bad(monkeypatch: pytest.MonkeyPatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "simplejpeg":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    bad = [check for check in doctor.package_checks() if not check.ok]
    assert [(check.name, check.found) for check in bad] == [("simplejpeg", "not installed")]


def test_gpus_that_are_not_there_are_missed_only_by_local_runs(monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not doctor.accelerators(load("celebahq-256")).ok
    assert "needs 4 GPUs" in doctor.accelerators(load("celebahq-256")).found
    assert doctor.accelerators(load("celebahq-256", ["cluster.address=head:6379"])).ok
    assert doctor.accelerators(load("digits")).ok


def test_a_head_that_does_not_listen_is_bad_at_once():
    check = doctor.ray_cluster(load("digits", [f"cluster.address={UNREACHABLE}"]))
    assert not check.ok
    assert "nothing answers" in check.found
    assert check.remedy == "correct the address, or start that cluster"


def test_a_folder_in_which_a_local_ray_cannot_start_is_bad(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", "/" + "a" * 90)
    check = doctor.ray_cluster(load("digits"))
    assert not check.ok
    assert check.remedy.startswith("`export RAY_TMPDIR=/tmp`")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert doctor.ray_cluster(load("digits")).ok


@pytest.mark.parametrize(
    ("resources", "ok"),
    [
        ({"CPU": 80.0, "GPU": 8.0}, True),
        ({"CPU": 80.0, "GPU": 7.0}, False),
        ({"CPU": 8.0, "GPU": 8.0}, False),
        ({}, False),
    ],
)
def test_a_cluster_is_compared_with_what_the_recipe_asks_for(
    resources: dict[str, float], ok: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "require_head", lambda address: None)
    answer = SimpleNamespace(returncode=0, stdout=f"noise\nRESOURCES {json.dumps(resources)}\n", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: answer)
    check = doctor.ray_cluster(load("celebahq-1024", ["cluster.address=auto"]))
    assert check.ok == ok
    assert ("needs 80 CPUs, 8 GPUs" in check.found) != ok


def test_a_cluster_that_refuses_hangs_or_takes_anyone_is_bad(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "require_head", lambda address: None)
    config = load("digits", ["cluster.address=auto"])
    answer = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nConnectionError: InvalidAuthToken")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: answer)
    assert "InvalidAuthToken" in doctor.ray_cluster(config).found

    answer = SimpleNamespace(returncode=0, stdout='RESOURCES {"CPU": 80}\nOPEN\n', stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: answer)
    assert "without a token" in doctor.ray_cluster(config).found

    def hang(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert "did not answer" in doctor.ray_cluster(config).found


def test_a_disk_too_full_is_bad(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    assert [check.ok for check in doctor.disk_checks(load("digits"))] == [False, False]
    assert doctor.shared_memory().ok
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    assert doctor.shared_memory().ok == (not Path("/dev/shm").is_dir())


def test_shards_of_s3_need_room_in_the_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 << 30))
    assert all(check.ok for check in doctor.disk_checks(load("digits")))
    config = load("digits", ["data.url=s3://bucket/x", "data.cache_gb=50"])
    assert [check.ok for check in doctor.disk_checks(config)] == [True, False]


class Server(http.server.BaseHTTPRequestHandler):
    """MLflow's health page: fine, or broken where the path says so."""

    def do_GET(self) -> None:
        self.send_response(500 if "broken" in self.path else 200 if self.path.endswith("/health") else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_a_tracking_server_is_asked(server: str):
    assert answers(f"tracking.uri={server}")["mlflow server"].ok
    broken = answers(f"tracking.uri={server}/broken")["mlflow server"]
    assert (broken.ok, "HTTP 500" in broken.found) == (False, True)


def test_a_tracking_server_that_is_not_there_is_bad():
    check = answers(f"tracking.uri=http://user:hunter2@{UNREACHABLE}")["mlflow server"]
    assert not check.ok
    assert "hunter2" not in str(check)
    assert "tracking.enabled=false" in check.remedy
    assert answers(f"tracking.uri=http://{UNREACHABLE}", "tracking.enabled=false")["mlflow server"].ok


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_mlflows_old_file_store_is_bad(uri: str):
    assert not answers(f"tracking.uri={uri}")["mlflow server"].ok


def test_data_that_is_there_is_read(packed: Config):
    check = doctor.data_set(packed)
    assert check.ok
    assert "6 images of 28 px" in check.found


def test_a_damaged_last_image_is_found(packed: Config, elsewhere: Path):
    shard = sorted((elsewhere / "data" / "x").glob("*.tar"))[-1]
    data = bytearray(shard.read_bytes())
    data[560] ^= 0xFF
    shard.write_bytes(bytes(data))
    check = doctor.data_set(packed)
    assert not check.ok
    assert shard.name in check.found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.resolution=32"], "data.resolution is 32"),
        (["data.channels=3"], "data.channels is 1"),
        (["cluster.workers=8"], "cluster.workers=8"),
    ],
)
def test_data_of_another_kind_is_found(packed: Config, overrides: list[str], message: str):
    message = message.replace("channels is 1", "channels is 3")
    check = doctor.data_set(load("digits", ["data.url=data/x", "data.source=null", *overrides]))
    assert (check.ok, message in check.found) == (False, True)


def test_missing_data_is_bad_only_if_nothing_can_be_packed():
    assert doctor.data_set(load("digits")).ok
    assert not doctor.data_set(load("digits", ["data.source=null"])).ok


def test_a_truncated_index_is_bad_even_if_it_could_be_packed(packed: Config, elsewhere: Path):
    index = elsewhere / "data" / "x" / "index.json"
    index.write_bytes(index.read_bytes()[:100])
    assert not doctor.data_set(load("digits", ["data.url=data/x"])).ok


def test_a_place_for_checkpoints_that_cannot_be_written_is_bad(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    check = doctor.checkpoints(load("digits"))
    assert (check.ok, "cannot be written" in check.found) == (False, True)


class Bucket:
    """A store that keeps what it is given, or does not."""

    url = "s3://bucket/runs"

    def __init__(self, lossy: bool, conditional: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.lossy, self.conditional = lossy, conditional

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        if only_if_absent and self.conditional and key in self.objects:
            raise ObjectExists(key)
        self.objects[key] = data[:-1] if self.lossy else data

    def read(self, key: str) -> bytes:
        return self.objects[key]

    def delete(self, key: str) -> None:
        del self.objects[key]


@pytest.mark.parametrize("lossy", [False, True])
def test_an_s3_place_for_checkpoints_is_tried_and_left_clean(lossy: bool, monkeypatch: pytest.MonkeyPatch):
    bucket = Bucket(lossy)
    monkeypatch.setattr(doctor, "open_store", lambda url, s3: bucket)
    check = doctor.checkpoints(load("digits", ["checkpoint.url=s3://bucket/runs"]))
    assert check.ok != lossy
    assert bucket.objects == {}
    assert "If-None-Match" not in check.found


def test_an_s3_server_that_overwrites_against_the_condition_is_told(monkeypatch: pytest.MonkeyPatch):
    bucket = Bucket(lossy=False, conditional=False)
    monkeypatch.setattr(doctor, "open_store", lambda url, s3: bucket)
    check = doctor.checkpoints(load("digits", ["checkpoint.url=s3://bucket/runs"]))
    assert check.ok
    assert "no If-None-Match: a second command on one run may not be refused" in check.found
    assert bucket.objects == {}


def test_s3_without_an_answer_is_bad(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as listening:  # a port that nobody serves
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    overrides = [f"s3.endpoint_url=http://127.0.0.1:{port}", "s3.max_attempts=1", "s3.timeout_s=1", "data.source=null"]
    check = doctor.data_set(load("digits", [*overrides, "data.url=s3://bucket/x"]))
    assert not check.ok
    assert "hunter2" not in str(check)


def test_the_cache_is_looked_up_where_it_is(elsewhere: Path):
    found = [check.found for check in doctor.disk_checks(None)]
    assert any(str(elsewhere / "cache") in line for line in found)


@pytest.mark.parametrize(
    ("proxy", "fault"),
    [
        (f"http://{UNREACHABLE}", "nothing answers there"),
        (UNREACHABLE, "nothing answers there"),
        ("http://[::1", "nothing answers there"),
        ("http://127.0.0.1:0", "nothing answers there"),
    ],
)
def test_a_proxy_that_does_not_answer_is_named_with_its_variable_and_the_way_around_it(
    monkeypatch: pytest.MonkeyPatch, proxy: str, fault: str
):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    config = load("digits", ["tracking.uri=http://tracker.invalid:5000"])
    [check] = doctor.proxies(config)
    assert not check.ok
    assert fault in check.found
    assert "http_proxy" in check.remedy
    assert "NO_PROXY=tracker.invalid" in check.remedy


def test_no_home_folder_is_one_bad_check(monkeypatch: pytest.MonkeyPatch):
    """A container that runs as a number: no HOME, and no line in /etc/passwd."""

    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("GLANN_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    good, bad = doctor.disk_checks(None)
    assert good.found.startswith("run folder")
    assert not bad.ok
    assert bad.remedy == "set HOME, or GLANN_CACHE to a folder that can be written"
