"""A registered champion answers HTTP requests with the images that it draws here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from glann.tracking.source import load_model
from mlflow import MlflowClient
from registered_runs import make_config, make_run, track

START_S = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A working folder with mlflow.db, in which `tiny` has a champion."""
    folder, before = tmp_path_factory.mktemp("served"), Path.cwd()
    os.chdir(folder)
    try:
        config = make_config("tiny")
        make_run(config)
        track(config, "sqlite:///mlflow.db", register_as="tiny")
        MlflowClient("sqlite:///mlflow.db").set_registered_model_alias("tiny", "champion", "1")
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def server(folder) -> Iterator[str]:
    """The command of docs/registry.md, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/tiny@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow calls uvicorn by name
    env = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "OMP_NUM_THREADS": "1", "PATH": path}
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(15)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start (status {process.poll()}):\n{log.read_text()[-4000:]}")
        time.sleep(0.2)


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_a_request_is_answered_with_the_images_of_the_champion(folder, server):
    model = load_model(folder / "runs" / "tiny")
    expected = model.sample(4, seed=7, truncation=0.8)
    answer = post(server, {"inputs": {"n": 4, "seed": 7, "truncation": 0.8}})
    images = np.array(answer["predictions"])
    assert images.shape == (4, 28, 28, 1)
    assert np.issubdtype(images.dtype, np.integer)  # JSON has no uint8
    np.testing.assert_array_equal(images.astype(np.uint8), expected)
    assert expected.std() > 10  # pictures, not one grey
    rows = {"dataframe_records": [{"n": 2, "seed": 7, "truncation": 0.8}, {"n": 1, "seed": 1, "truncation": 1.0}]}
    drawn = np.array(post(server, rows)["predictions"])
    np.testing.assert_array_equal(drawn, np.concatenate([expected[:2], model.sample(1, seed=1)]))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"inputs": {"n": 100_000}}, "100000 images in one request; the limit is 4096"),
        ({"inputs": {"n": 2, "truncation": 11.0}}, "truncation=11.0 is not possible"),
        ({"inputs": {"seed": 1}}, "Model is missing inputs ['n']"),
        ({"nonsense": 1}, "exactly one of the input fields"),
    ],
)
def test_an_impossible_request_is_refused_and_the_server_goes_on(server, body, told):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, body)
    assert refused.value.code == 400
    answer = json.load(refused.value)
    assert told in answer["message"]
    assert "Traceback" not in str(answer)
    assert len(post(server, {"inputs": {"n": 1}})["predictions"]) == 1
