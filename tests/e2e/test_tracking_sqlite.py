"""The database file that tracking starts with: several processes make it and write to it at once, one dies over it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from mlflow import MlflowClient

PROCESSES, METRICS = 4, 200
WRITER = """
import sys, time
from pathlib import Path
from glann.config.run import Config
from glann.tracking.runs import TrackedRun

uri, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
config = Config.model_validate({
    "name": folder.name,
    "data": {"url": "data", "resolution": 28, "channels": 1},
    "generator": {"kind": "infogan", "latent_dim": 6, "width": 4},
    "glo": {"epochs": 1},
    "imle": {"noise_dim": 5, "hidden_dim": 8},
    "tracking": {"uri": uri},
})
import mlflow  # takes seconds, and the writers are to meet at the database
print("ready", flush=True)
sys.stdin.readline()
run = TrackedRun.open(config, folder)
for step in range(steps):
    run.log_metrics({"stage": "glo", "loss": float(step)}, step)
    time.sleep(0.02)
run.finish()
print(run.run_id)
"""


def writer(uri: str, folder: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, uri, str(folder), str(steps)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=folder.parent)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise AssertionError(process.communicate()[1])
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_runs_that_start_at_once_make_one_database_and_lose_nothing(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    writers = [writer(uri, tmp_path / f"run-{number}", METRICS) for number in range(PROCESSES)]
    for process in writers:
        go(process)
    said = [process.communicate(timeout=240) for process in writers]
    assert [process.returncode for process in writers] == [0] * PROCESSES, said
    assert not any("does not take" in err for _, err in said), said
    client = MlflowClient(uri)
    runs = {out.split()[-1] for out, _ in said}
    assert len(runs) == PROCESSES
    for run_id in runs:
        stored = client.get_run(run_id)
        assert stored.info.status == "FINISHED"
        history = client.get_metric_history(run_id, "glo/loss")
        assert sorted((each.step, each.value) for each in history) == [(step, float(step)) for step in range(METRICS)]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def database_sizes(folder):
    for path in folder.glob("*mlflow.db*"):
        with contextlib.suppress(FileNotFoundError):  # SQLite removes its journal after each transaction
            yield path.stat().st_size


def test_a_run_killed_over_the_tables_leaves_no_database_that_cannot_be_used(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = writer(uri, tmp_path / "run", 1)
    go(process)
    deadline = time.monotonic() + 120
    while not any(size > 300_000 for size in database_sizes(tmp_path)):  # about a third of it
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    again = writer(uri, tmp_path / "run", 1)
    out, err = again.communicate("go\n", timeout=240)
    assert again.returncode == 0, err
    assert len(MlflowClient(uri).get_metric_history(out.split()[-1], "glo/loss")) == 1
