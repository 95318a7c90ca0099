"""What a user sees of the lease and of damaged checkpoints, from the command line."""

from __future__ import annotations

import os
import signal
import time

import pytest
from glann.cluster.checkpoints import reader, retention
from glann.storage.local import LocalStore

pytestmark = pytest.mark.matrix


def test_a_second_command_is_refused_and_a_killed_one_goes_on_before_a_damaged_checkpoint(glann):
    place = glann.folder / "elsewhere"
    command = ("train", "digits", *glann.small, "name=held", "imle.epochs=1", f"checkpoint.url={place}")
    store = LocalStore(place / "held" / "checkpoints")
    process = glann.start(*command)
    deadline = time.monotonic() + 360
    while len(retention.usable(store)[0]) < 2:  # one to damage and one to go on from
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)

    # The same run from another folder, as from another machine: only the store is shared.
    second = glann(*command, "runs_dir=others")
    assert second.returncode == 2, second.stdout + second.stderr
    refusal = " ".join(second.stderr.split())
    assert f"process {process.pid}" in refusal
    assert "has been training the run" in refusal
    assert "can take over" in refusal
    assert not (glann.folder / "others" / "held").exists()

    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    newest, before = retention.latest(store), None
    while newest != before:  # its workers end a little later
        time.sleep(15)
        newest, before = retention.latest(store), newest
    key = store.list(f"step-{newest:06d}/")[0]
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.write(key, bytes(data))

    done = glann(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "is gone; taking over" in said
    assert f"damaged checkpoint of step {newest} is skipped" in said
    assert "is not what was saved" in said
    assert "resuming from the checkpoint" in said
    assert reader.load_state(store, retention.latest(store))["position"]["stage"] == "done"
