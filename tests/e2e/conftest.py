"""The command as a user runs it: a process of its own, in an empty folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A run of seconds that goes through every room: real digits, two workers, DeepSpeed, both stages.
SMALL = (
    "data.max_rows=600",
    "generator.width=16",
    "generator.latent_dim=16",
    "loss.kind=l1",
    "glo.epochs=12",
    "glo.batch_size=40",
    "evaluation.extractor=squeezenet",
    "sampler.kind=imle",
    "imle.epochs=12",
    "imle.noise_dim=8",
    "checkpoint.every_epochs=1",
    "preview.every_epochs=6",
    "evaluation.samples=100",
)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A shell starts what it puts into the background deaf to Ctrl-C, and so would be all that these tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Glann:
    """`glann` in a folder of its own."""

    small = SMALL

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        self.env.pop("RAY_ADDRESS", None)
        self.env.pop("MLFLOW_TRACKING_URI", None)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "glann", *words]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *words: str, timeout: float = 400, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **env)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"glann {' '.join(words)} took over {timeout} s\n{out}\n{err}")
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def train(self, *overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self("train", "digits", *SMALL, *overrides, **env)

    def entries(self, run: str) -> list[dict]:
        """The journal of a run so far; the last line may be torn while it is written."""
        path = self.folder / "runs" / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_epoch(self, process: subprocess.Popen[str], run: str, stage: str, epoch: int) -> None:
        """Until `epoch` of `stage` is in the journal."""
        deadline = time.monotonic() + 300
        while not any(e.get("stage") == stage and e["epoch"] >= epoch for e in self.entries(run)):
            if process.poll() is not None or time.monotonic() > deadline:
                out, err = process.communicate()
                pytest.fail(f"the run ended (status {process.returncode}) before {stage} epoch {epoch}:\n{out}\n{err}")
            time.sleep(0.05)


@pytest.fixture(scope="session")
def glann(tmp_path_factory) -> Glann:
    """One folder for the session: data are packed once, and every test names its own run."""
    return Glann(tmp_path_factory.mktemp("empty"))
