"""Processes of a run are killed at random moments; it goes on by itself and ends bit for bit as an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import time

import numpy as np
import psutil
import pytest
from glann.cluster.checkpoints import reader, retention
from glann.config.sections import S3Config
from glann.storage.open import open_store

ROWS = 600


def final(glann, run):
    """Every array of the last checkpoint of a run, and its counters."""
    store = open_store(str(glann.folder / "runs" / run / "checkpoints"), S3Config())
    step = retention.latest(store)
    arrays = {}
    for name in reader.names(store, step):
        arrays |= {f"{name}/{key}": t.numpy() for key, t in reader.load_tensors(store, step, name).items()}
    return arrays | reader.load_rows(store, step, range(ROWS)), reader.load_state(store, step)["position"]


def wait_for(process, condition, what):
    deadline = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            out, err = process.communicate()
            pytest.fail(f"no {what} (status {process.returncode}):\n{out}\n{err}")
        time.sleep(0.02)


def kill(process, actor, pick):
    """SIGKILL one of the processes of the run's own Ray that run this actor."""
    victims = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(f"ray::{actor}" in word for word in child.cmdline()[:1]):
                victims.append(child)
    pick.choice(victims).send_signal(signal.SIGKILL)


@pytest.mark.matrix
@pytest.mark.timeout(2400)
def test_killed_workers_and_tables_change_nothing_of_the_result(glann):
    """Workers and latent actors, in both stages, around checkpoints: there is one after every epoch."""
    seed = os.environ.get("GLANN_FAULT_SEED") or str(secrets.randbits(32))
    print(f"GLANN_FAULT_SEED={seed}")
    pick = random.Random(seed)
    quiet = ("tracking.enabled=false", "cluster.workers=2", "imle.epochs=40")
    assert glann("train", "digits", *glann.small, "name=quiet", *quiet, timeout=900).returncode == 0
    process = glann.start("train", "digits", *glann.small, "name=struck", *quiet)
    faults = []
    for stage, epoch, actor in (
        ("glo", 2, "RayTrainWorker"),
        ("glo", 6, "LatentShard"),
        ("imle", 4, "RayTrainWorker"),
    ):
        glann.wait_for_epoch(process, "struck", stage, epoch)
        time.sleep(pick.uniform(0.0, 0.3))
        told = len(events(glann, "restarted"))
        kill(process, actor, pick)
        faults.append(time.time())
        wait_for(process, lambda: len(events(glann, "restarted")) > told, f"restart after {actor}")  # noqa: B023
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    took = [event["time"] - fault for event, fault in zip(events(glann, "restarted"), faults, strict=True)]
    print("seconds from a kill to the first new step:", [round(seconds, 1) for seconds in took])
    assert out.count("training again with 2 workers") == 3, out
    assert "unexpected" not in out + err
    (a, position_a), (b, position_b) = final(glann, "quiet"), final(glann, "struck")
    assert position_a == position_b
    assert a.keys() == b.keys()
    assert not [name for name in a if not np.array_equal(a[name], b[name])]
    assert (b["steps"] == 12).all()


def events(glann, kind):
    return [entry for entry in glann.entries("struck") if entry.get("event") == kind]
