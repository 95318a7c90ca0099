"""A node that gets a drain notice or SIGTERM is left with a checkpoint; with nowhere to go the run ends saved."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray_head import free_ports

RAY = str(Path(sys.executable).with_name("ray"))
NODES = """
import ray
ray.init(address="{address}", logging_level="ERROR", log_to_driver=False)
print(*[node["NodeID"] for node in ray.nodes() if node["Alive"] and "{mark}" in node["Resources"]])
"""


class TwoNodes:
    """A Ray cluster of raylets on this machine: the head, and nodes that come and go, one CPU each."""

    def __init__(self, folder: Path) -> None:
        [port] = free_ports(1)
        self.folder, self.address = folder, f"127.0.0.1:{port}"
        self.env = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self.started: list[subprocess.Popen] = []
        self.start("head", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")

    def start(self, mark: str, *words: str) -> None:
        command = [RAY, "start", "--block", "--num-cpus=1", f'--resources={{"{mark}": 1}}', *words]
        deadline, tries = time.monotonic() + 240, 0
        log = self.folder / f"{mark}.log"
        while not tries or not self.node(mark):
            if not tries or self.started[-1].poll() is not None:  # a busy machine misses Ray's own deadlines
                tries += 1
                assert tries <= 3, log.read_text()
                with log.open("w") as file:
                    self.started.append(subprocess.Popen(command, env=self.env, stdout=file, stderr=file))
            assert time.monotonic() < deadline, f"{mark} did not join"
            time.sleep(1)

    def join(self, mark: str) -> None:
        self.start(mark, f"--address={self.address}")

    def node(self, mark: str) -> str:
        """Id of the node of this mark, empty while there is none."""
        asked = [sys.executable, "-c", NODES.format(address=self.address, mark=mark)]
        return subprocess.run(asked, env=self.env, capture_output=True, text=True).stdout.strip()

    def drain(self, mark: str) -> None:
        """What a cloud's notice of two minutes comes to."""
        notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=120"]
        command = [RAY, "drain-node", f"--address={self.address}", f"--node-id={self.node(mark)}", *notice]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def terminate(self) -> None:
        """SIGTERM to the `ray start --block` of the node that was started last, as a supervisor sends it."""
        self.started[-1].send_signal(signal.SIGTERM)

    def end(self) -> None:
        for process in reversed(self.started):
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path_factory):
    nodes = None
    try:
        nodes = TwoNodes(tmp_path_factory.mktemp("r"))
        yield nodes
    finally:
        if nodes:
            nodes.end()


def events(glann, run, kind):
    return [entry for entry in glann.entries(run) if entry.get("event") == kind]


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_a_drained_node_is_left_with_a_checkpoint(glann, cluster):
    cluster.join("first")
    common = (
        f"cluster.address={cluster.address}",
        "tracking.enabled=false",
        "glo.epochs=400",
        "checkpoint.every_epochs=2",
    )
    process = glann.start(
        "train",
        "digits",
        *glann.small,
        "name=moves",
        *common,
        "cluster.workers={min: 1, max: 2}",
        RAY_AUTH_MODE="disabled",
    )
    glann.wait_for_epoch(process, "moves", "glo", 2)
    [started] = events(glann, "moves", "started")
    assert started["workers"] == 2
    cluster.drain("first")
    wait_for(process, lambda: events(glann, "moves", "restarted"), "restart")
    [again] = events(glann, "moves", "restarted")
    assert again["workers"] == 1
    assert "is being taken away" in again["why"]
    done = max(e["epoch"] for e in glann.entries("moves") if e.get("stage") == "glo" and e["time"] < again["time"])
    assert again["place"]["epoch"] == done, "work was lost though there was time to save it"
    print("seconds from the last step to the next:", again["gap_s"])
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75, out + err

    cluster.join("second")
    process = glann.start(
        "train",
        "digits",
        *glann.small,
        "name=stays",
        *common,
        "cluster.workers=2",
        "cluster.start_timeout_s=20",
        RAY_AUTH_MODE="disabled",
    )
    glann.wait_for_epoch(process, "stays", "glo", 2)
    cluster.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, out + err
    assert "there is no other capacity" in " ".join(err.split())
    assert "the same command resumes from the last checkpoint" in " ".join(err.split())


def wait_for(process, condition, what):
    deadline = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"no {what} (status {process.returncode}):\n{out}\n{err}")
        time.sleep(0.05)
