"""What a failed group of workers comes down to: tried again, or the user's, or a bug's, whatever its peers died of."""

from __future__ import annotations

import pytest
from glann.errors import EnvironmentFault, UserError
from glann.trainers.run.mailbox import MOVE, NOTHING, SAVE, STOP, Mailbox, saves, stops
from glann.trainers.run.recovery import verdict
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

RESET = RuntimeError("[gloo] Connection closed by peer")


def group(*failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("text", dict(enumerate(failures)))


def lost(text: str) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError(text, failure=RayActorError())


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (group(RESET, UserError("latents are not finite")), UserError, "latents are not finite"),
        (group(RESET, TypeError("a bug")), TypeError, "a bug"),
        (group(RESET, EnvironmentFault("the disk is full")), EnvironmentFault, "^the disk is full$"),
        (group(RESET, lost("killed")), EnvironmentFault, "^worker 1 lost$"),
        (group(lost("its node has died"), RESET, lost("gone")), EnvironmentFault, "^workers 0, 2 lost"),
        (group(RESET), EnvironmentFault, "worker 0 failed .*Connection closed by peer"),
        (
            ControllerError(WorkerGroupStartupTimeoutError(2)),
            EnvironmentFault,
            r"^the workers did not start \(.*waiting for 2 workers\)$",
        ),
        (OSError(28, "No space left on device"), EnvironmentFault, "No space left"),
        (ValueError("a bug in the driver"), ValueError, "a bug in the driver"),
    ],
)
def test_the_most_telling_error_counts(error: Exception, kind: type[Exception], said: str):
    with pytest.raises(kind, match=said):
        raise verdict(error)


@pytest.mark.parametrize("workers", [1, 7, 4096])
def test_votes_of_any_number_of_workers_add_up_to_what_was_meant(workers: int):
    """Only rank 0 votes to save by the clock; what the driver asks may have reached any number of workers."""
    for reached in {1, workers}:
        assert not saves(MOVE * reached)
        assert not stops(MOVE * reached, saving=False)
        assert stops(MOVE * reached, saving=True)  # an epoch's end asks for a checkpoint anyway
        assert stops(MOVE * reached + SAVE, saving=True)
        assert saves(STOP * reached)
        assert stops(STOP * reached + SAVE, saving=False)
    assert saves(SAVE)
    assert not stops(SAVE, saving=True)
    assert not saves(NOTHING)


def test_a_mailbox_that_was_started_again_learns_what_is_asked_from_the_next_word_of_the_driver():
    mailbox = Mailbox()
    mailbox.drain(STOP)
    assert mailbox.send({"kind": "progress"}) == STOP
    again = Mailbox()
    assert again.send({"kind": "progress"}) == NOTHING
    assert again.drain(STOP) == [{"kind": "progress"}]
    assert again.send({"kind": "progress"}) == STOP
