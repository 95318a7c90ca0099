"""How workers and driver exchange messages: one small actor, so that a single place logs, draws and tracks."""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import Any

from ...errors import EnvironmentFault
from .control import Request
from .events import FromWorker, Message, Phase, Progress

PROGRESS_EVERY = 0.5  # seconds; a bar needs no more
STOPPED = "stopped"  # what a worker returns that was asked to stop


class Mailbox:
    """Actor between workers and driver: events one way, the driver's request the other way."""

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()
        self.request = Request.NOTHING

    def send(self, message: Message) -> Request:
        """Keep a message for the driver; returns what the driver wants of the workers."""
        self.messages.append(message)
        return self.request

    def drain(self, request: Request) -> list[Message]:
        """Hand over all messages so far, oldest first, and take the request: the driver repeats it with every call."""
        self.request = request
        messages, self.messages = list(self.messages), deque()
        return messages


class Reporter:
    """A worker's end of the mailbox. Sending never waits."""

    def __init__(self, mailbox: Any, rank: int, group: int) -> None:
        """`group` numbers the starts of the workers, so that the driver can tell a message of a past one."""
        self.mailbox, self.rank, self.group = mailbox, rank, group
        self.last_progress = 0.0
        self.phase = ""
        self.answer: Any = None
        self.last_request = Request.NOTHING

    def send(self, event: FromWorker) -> None:
        self.answer = self.mailbox.send.remote(Message(self.group, event))

    def progress(self, event: Progress) -> None:
        """Send a progress event unless one was sent just before."""
        now = monotonic()
        if now - self.last_progress >= PROGRESS_EVERY:
            self.last_progress = now
            self.send(event)

    def enter(self, phase: str) -> None:
        """Report the phase of the work where it is another than before; only rank 0 does."""
        if self.rank == 0 and phase != self.phase:
            self.phase = phase
            self.send(Phase(phase))

    def requested(self) -> Request:
        """What the driver wants, by its last answer that has arrived; never waits.

        Raises:
            EnvironmentFault: the mailbox is lost, and with it the driver or its node.
        """
        import ray

        if self.answer is not None:
            ready, _ = ray.wait([self.answer], timeout=0)
            if ready:
                self.answer = None
                try:
                    self.last_request = ray.get(ready[0])
                except ray.exceptions.RayError as error:
                    raise EnvironmentFault("the driver of the run does not answer any more") from error
        return self.last_request
