"""Signals between the driver and its workers, and what a run says of itself when it ends early."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from glann.config.run import load
from glann.errors import EnvironmentFault, ExitStatus
from glann.trainers.run.control import Control, Request, Signals
from glann.trainers.run.events import Message, Phase
from glann.trainers.run.failures import CannotImport
from glann.trainers.run.mailbox import Mailbox
from glann.trainers.run.recovery import Groups, RunStopped
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import ControllerError


@pytest.mark.parametrize("workers", [1, 7, 4096])
def test_the_piggybacks_of_any_number_of_workers_say_what_one_of_them_wants(workers: int):
    """Only rank 0 watches the clock; a request of the driver may have reached any number of workers."""

    def agreed(request: Request, reached: int, due: bool = False) -> Signals:
        wishes = [Control(lambda: request, lambda: False).write()] * reached
        wishes += [Control(lambda: Request.NOTHING, lambda: False).write()] * (workers - reached)
        wishes[0] = wishes[0] + Control(lambda: Request.NOTHING, lambda: due).write()
        return Control.read(torch.stack(wishes).sum(0))

    for reached in {1, workers}:
        move = agreed(Request.MOVE, reached)
        assert not move.save
        assert not move.ends(saving=False)
        assert move.ends(saving=True)  # an epoch's end asks for a checkpoint anyway
        assert agreed(Request.MOVE, reached, due=True) == Signals(save=True, move=True, stop=False)
        assert agreed(Request.STOP, reached).ends(saving=False)
    assert agreed(Request.NOTHING, 1, due=True) == Signals(save=True, move=False, stop=False)
    assert agreed(Request.NOTHING, 1) == Signals(save=False, move=False, stop=False)


def test_a_mailbox_that_was_started_again_learns_the_request_from_the_next_call_of_the_driver():
    mailbox, message = Mailbox(), Message(1, Phase("glo"))
    mailbox.drain(Request.STOP)
    assert mailbox.send(message) == Request.STOP
    again = Mailbox()
    assert again.send(message) == Request.NOTHING
    assert again.drain(Request.STOP) == [message]
    assert again.send(message) == Request.STOP


def groups_of(saved: int, why: str = "worker 0 lost") -> Groups:
    """The groups of a run after a loss, without a cluster. saved: serial of the newest checkpoint, 0 for none."""
    groups = Groups.__new__(Groups)
    groups.config, groups.saved, groups.why, groups.failures, groups.stopping = load("digits"), saved, why, 0, ""
    groups.evaluating = False
    groups.refresh_latest_checkpoint = lambda: False  # type: ignore[method-assign]
    return groups


def test_no_capacity_after_a_loss_promises_a_checkpoint_only_where_there_is_one():
    """Status 75 says that everything is saved."""
    saved, unsaved, first = (groups_of(7), groups_of(0), groups_of(0, why=""))
    stopped = saved.no_capacity(0)
    assert stopped.exit_status == ExitStatus.STOPPED
    assert str(stopped).endswith("the same command resumes from the last checkpoint")
    for groups, said in (
        (unsaved, "worker 0 lost, and the cluster has room for 0 of 2"),
        (first, "the cluster has room"),
    ):
        failed = groups.no_capacity(0)
        assert failed.exit_status == ExitStatus.ENVIRONMENT
        assert str(failed).startswith(said)
        assert "checkpoint" not in str(failed)


@pytest.mark.parametrize(("saved", "said"), [(0, "nothing was saved yet"), (7, "resumes from the last checkpoint")])
def test_a_run_that_ends_says_whether_there_is_a_checkpoint(saved: int, said: str):
    groups = groups_of(saved)
    groups.failures = groups.config.cluster.max_failures
    with pytest.raises(EnvironmentFault, match=rf"lost 4 times .*{said}"):
        groups.after_loss(RayActorError())
    groups = groups_of(saved)
    groups.stopping = "the run was stopped"
    with pytest.raises(RunStopped, match=f"^the run was stopped, but not saved .*{said}"):
        groups.after_loss(RayActorError())


@pytest.mark.parametrize("error", [AttributeError("no attribute run"), ImportError("No module named 'deepspeed'")])
def test_what_would_fail_again_is_not_started_again(error: Exception, monkeypatch: pytest.MonkeyPatch):
    groups = groups_of(0)
    groups.on_event = lambda event: pytest.fail(f"started again: {event}")
    with pytest.raises((AttributeError, CannotImport)):
        groups.after_loss(ControllerError(error))


WAITS_FOR_EVER = """
import threading
from concurrent.futures import TimeoutError
from glann.trainers.run.recovery import in_background

future = in_background(threading.Event().wait)
try:
    future.exception(0.1)
except TimeoutError:
    print("left behind")
assert in_background(lambda: 3).result(10) == 3
assert isinstance(in_background(lambda: 1 / 0).exception(10), ZeroDivisionError)
"""


def test_a_thread_that_waits_for_ever_keeps_no_command_from_its_end():
    """Ray does not always wake the thread that waits for workers when it is shut down: a full disk hung the command."""
    done = subprocess.run([sys.executable, "-c", WAITS_FOR_EVER], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "left behind\n"), done.stderr
