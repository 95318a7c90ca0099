"""Planted secrets are looked for in everything that commands leave behind: folders, servers, logs and the screen.

Each secret is a word of its own, so that one that gets out says by which door.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import boto3
import pytest
from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.matrix

# With what an address may hold besides letters: a slash, a percent sign, a colon.
TRACKING = "planted%2Ftracking:password"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret+key/0123456789abcdefg",
    "AWS_SESSION_TOKEN": "planted-aws-session-token",
    "RAY_AUTH_TOKEN": "planted-ray-token-0123456789abcdef",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
}
ENDPOINT = "planted-endpoint-password"
UNREACHABLE = f"http://me:{TRACKING}@127.0.0.1:1"


def forms(secret: str) -> set[bytes]:
    """The ways in which a secret may be written."""
    plain = {secret, quote(secret, safe=""), secret.replace("%2F", "/"), repr(secret)[1:-1]}
    pairs = {base64.b64encode(f"me:{word}".encode()).decode() for word in plain}
    return {word.encode() for word in plain | pairs}


def leaks(content: bytes) -> list[str]:
    """The names of the secrets in it."""
    planted = SECRETS | {"tracking.uri": TRACKING, "AWS_ENDPOINT_URL": ENDPOINT}
    return [name for name, secret in planted.items() if any(form in content for form in forms(secret))]


def leaks_below(folder: Path) -> list[str]:
    """`file: secret` for every file below the folder that holds one."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    assert files, folder
    return [f"{path.relative_to(folder)}: {name}" for path in files for name in leaks(path.read_bytes())]


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets have at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="glann-secrets-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tracker(short: Path) -> Iterator[str]:
    """A real tracking server, at an address with a password."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = short / "mlflow"
    home.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "files")]
    with open(home / "server.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=home, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (home / "server.log").read_text()
                assert time.monotonic() < deadline, (home / "server.log").read_text()
                time.sleep(0.5)
        yield f"http://me:{TRACKING}@127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


@pytest.fixture(scope="module")
def storage(short: Path) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    client.create_bucket(Bucket="runs")
    yield endpoint
    server.stop()


def copy_of_bucket(endpoint: str, folder: Path) -> Path:
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="runs"):
        for entry in page["Contents"]:
            path = folder / entry["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file("runs", entry["Key"], str(path))
    return folder


@pytest.fixture(scope="module")
def env(short: Path) -> dict[str, str]:
    """Every secret in the environment, and Ray's own files where they can be searched."""
    return SECRETS | {
        "AWS_ACCESS_KEY_ID": "planted",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(short),
    }


@pytest.fixture(scope="module")
def trained(glann, env, tracker: str, storage: str):
    """A whole run with secrets wherever they can be given."""
    where = (f"tracking.uri={tracker}", f"s3.endpoint_url={storage}", "checkpoint.url=s3://runs/planted")
    return glann.train("name=secrets", "glo.epochs=2", "imle.epochs=2", *where, **env)


def test_a_run_leaves_no_secret_anywhere(glann, env, short: Path, trained, storage: str, tmp_path: Path):
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert leaks((trained.stdout + trained.stderr).encode()) == []
    run = glann.folder / "runs" / "secrets"
    assert leaks_below(run) == []
    assert {"config.yaml", "tracked-config.yaml", "tracking.json", "metrics.jsonl", "report.html", "model"} <= {
        path.name for path in run.iterdir()
    }
    assert "http://***@127.0.0.1" in (run / "config.yaml").read_text()
    bucket = copy_of_bucket(storage, tmp_path)
    assert list(bucket.rglob("manifest.json"))
    assert leaks_below(bucket) == []
    files = [path.name for path in (short / "mlflow" / "files").rglob("*")]
    assert "tracked-config.yaml" in files
    assert "model.json" in files
    assert leaks_below(short / "mlflow") == []
    sessions = list((short / "ray").glob("session_2*"))
    assert sessions
    assert leaks_below(short / "ray") == []


def test_the_same_command_goes_on_though_the_saved_address_is_redacted(glann, env, trained, tracker: str, storage: str):
    assert trained.returncode == 0, trained.stdout + trained.stderr
    where = (f"tracking.uri={tracker}", f"s3.endpoint_url={storage}", "checkpoint.url=s3://runs/planted")
    again = glann.train("name=secrets", "glo.epochs=2", "imle.epochs=2", *where, **env)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout
    assert leaks((again.stdout + again.stderr).encode()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("config", "digits", f"tracking.uri={UNREACHABLE}"),
        ("report", "runs/secrets"),
        ("doctor", "digits", f"tracking.uri={UNREACHABLE}", "data.source=null", "data.url=s3://runs/none"),
        ("doctor", "digits", "checkpoint.url=s3://runs/none"),
    ],
)
def test_looking_shows_no_secret(glann, env, trained, words: tuple[str, ...]):
    shown = glann(*words, **env, AWS_ENDPOINT_URL=f"http://me:{ENDPOINT}@127.0.0.1:1")
    assert shown.stdout
    assert leaks((shown.stdout + shown.stderr).encode()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("train", "digits", f"tracking.uri={UNREACHABLE}"),
        ("train", "digits", f"tracking.uri={UNREACHABLE}", "--traceback"),
        ("train", "digits", f"tracking.uri=postgresql://me:{TRACKING}@127.0.0.1:1/mlflow", "--traceback"),
        ("train", "digits", "data.url=s3://runs/none", "s3.max_attempts=1", "s3.timeout_s=1", "--traceback"),
        ("sample", "models:/nothing@best", "--traceback"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_failing_shows_no_secret(glann, env, words: tuple[str, ...]):
    """With --traceback the errors of MLflow, SQLAlchemy and botocore are shown too, which know more than ours."""
    addresses = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "MLFLOW_TRACKING_URI": UNREACHABLE}
    failed = glann(*words, **env, **addresses)
    assert failed.returncode in (1, 2), failed.stderr
    assert ("Traceback" in failed.stderr) == ("--traceback" in words), failed.stderr
    assert leaks((failed.stdout + failed.stderr).encode()) == [], failed.stderr


def test_the_search_would_find_them(tmp_path: Path):
    """The test of the test: every secret in every form is found."""
    for name, secret in (SECRETS | {"tracking.uri": TRACKING, "AWS_ENDPOINT_URL": ENDPOINT}).items():
        for form in forms(secret):
            (tmp_path / "file").write_bytes(b"\0 " + form + b" \xff")
            assert leaks_below(tmp_path) == [f"file: {name}"]
