"""Messages between workers and driver through one actor, so that only the driver logs, draws and tracks."""

from __future__ import annotations

import math
from collections import deque
from time import monotonic
from typing import Any

from ...errors import EnvironmentFault
from .control import Request
from .events import Evaluating, FromWorker, Message, Phase, Progress

PROGRESS_EVERY_S = 0.5  # a bar needs no more
MESSAGES_PER_S = 32  # of a kind that every worker repeats, of all of them together: the mailbox is one actor
STOPPED = "stopped"  # return value of a worker that stopped on request


class Mailbox:
    """Actor between workers and driver: events one way, the driver's request the other way."""

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()
        self.request = Request.NOTHING

    def send(self, message: Message) -> Request:
        """Queue a message for the driver; returns the driver's current request."""
        self.messages.append(message)
        return self.request

    def drain(self, request: Request) -> list[Message]:
        """Return all queued messages, oldest first, and store the request, which the driver repeats with every call."""
        self.request = request
        messages, self.messages = list(self.messages), deque()
        return messages


def interval(seconds: float, workers: int) -> float:
    """Seconds between a worker's messages of a kind that all workers repeat: `seconds` if there are few workers."""
    return max(seconds, workers / MESSAGES_PER_S)


class Reporter:
    """A worker's interface to the mailbox. Sending never blocks.

    Args:
        group: number of the worker group, by which the driver detects messages of past groups.
        workers: of the group.
    """

    def __init__(self, mailbox: Any, rank: int, group: int, workers: int) -> None:
        self.mailbox, self.rank, self.group = mailbox, rank, group
        self.progress_every = {Progress: PROGRESS_EVERY_S, Evaluating: interval(PROGRESS_EVERY_S, workers)}
        self.last_progress = -math.inf
        self.phase = ""
        self.answer: Any = None
        self.last_request = Request.NOTHING

    def send(self, event: FromWorker) -> None:
        self.answer = self.mailbox.send.remote(Message(self.group, event))

    def post(self, event: FromWorker) -> None:
        """Send an event from another thread of the worker."""
        self.mailbox.send.remote(Message(self.group, event))

    def progress(self, event: Progress | Evaluating) -> None:
        """Send a progress event, unless the last one was a short time ago."""
        now = monotonic()
        if now - self.last_progress >= self.progress_every[type(event)]:
            self.last_progress = now
            self.send(event)

    def enter(self, phase: str) -> None:
        """Report a change of phase; only rank 0 does."""
        if self.rank == 0 and phase != self.phase:
            self.phase = phase
            self.send(Phase(phase))

    def requested(self) -> Request:
        """The driver's request in the last answer that has arrived; never blocks.

        Raises:
            EnvironmentFault: the mailbox was lost, and so the driver or its node.
        """
        import ray

        if self.answer is not None:
            ready, _ = ray.wait([self.answer], timeout=0)
            if ready:
                self.answer = None
                try:
                    self.last_request = ray.get(ready[0])
                except ray.exceptions.RayError as error:
                    raise EnvironmentFault("the driver of the run no longer answers") from error
        return self.last_request
