"""Signals between the driver and its workers, and what a run says of itself when it ends early."""

from __future__ import annotations

import pytest
import torch
from glann.trainers.run.control import Control, Request, Signals
from glann.trainers.run.events import Message, Phase
from glann.trainers.run.mailbox import Mailbox


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
