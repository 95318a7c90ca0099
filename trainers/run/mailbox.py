"""How workers speak to the driver: one small actor, so that a single place logs, draws and tracks."""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import Any

from ...errors import EnvironmentFault

PROGRESS_EVERY = 0.5  # seconds; a bar needs no more

# What the driver may ask of the workers, the more urgent the larger. A worker hands it on as its vote at the next
# step, beside a vote of its own to save; the votes of all are added, so that all of them do the same.
NOTHING, MOVE, SAVE, STOP = 0.0, 2.0**-13, 1.0, 8192.0


def saves(votes: float) -> bool:
    """Whether the votes of all workers ask for a checkpoint now."""
    return votes >= SAVE


def stops(votes: float, saving: bool) -> bool:
    """Whether they ask to end here: at once, or, to move, with a checkpoint that is made anyway."""
    return votes >= STOP or (saving and votes % SAVE > 0)


class Mailbox:
    """Actor between workers and driver: events one way, what is asked of the workers the other way."""

    def __init__(self) -> None:
        self.events: deque[dict[str, Any]] = deque()
        self.asked = NOTHING

    def send(self, event: dict[str, Any]) -> float:
        """Keep an event for the driver; returns what is asked of the workers."""
        self.events.append(event)
        return self.asked

    def drain(self, asked: float) -> list[dict[str, Any]]:
        """Hand over all events so far, oldest first, and take what is asked: the driver repeats it with every call."""
        self.asked = asked
        events, self.events = list(self.events), deque()
        return events


class Reporter:
    """A worker's end of the mailbox. Sending never waits."""

    def __init__(self, mailbox: Any, rank: int, group: int) -> None:
        """`group` numbers the starts of the workers, so that the driver knows a word of a past one."""
        self.mailbox, self.rank, self.group = mailbox, rank, group
        self.last_progress = 0.0
        self.phase = ""
        self.answer: Any = None
        self.last_asked = NOTHING

    def send(self, kind: str, **event: Any) -> None:
        self.answer = self.mailbox.send.remote({"kind": kind, "rank": self.rank, "group": self.group} | event)

    def progress(self, **event: Any) -> None:
        """Send a progress event unless one was sent just before."""
        now = monotonic()
        if now - self.last_progress >= PROGRESS_EVERY:
            self.last_progress = now
            self.send("progress", **event)

    def enter(self, phase: str) -> None:
        """Say what is being done, where that is something else than before; only rank 0 does."""
        if self.rank == 0 and phase != self.phase:
            self.phase = phase
            self.send("phase", phase=phase)

    def asked(self) -> float:
        """What the driver asked of the workers in its last answer that has arrived; never waits.

        Raises:
            EnvironmentFault: the mailbox is lost, and with it the driver or its node.
        """
        import ray

        if self.answer is not None:
            ready, _ = ray.wait([self.answer], timeout=0)
            if ready:
                self.answer = None
                try:
                    self.last_asked = ray.get(ready[0])
                except ray.exceptions.RayError as error:
                    raise EnvironmentFault("the driver of the run does not answer any more") from error
        return self.last_asked


STOPPED = "stopped"  # what a worker returns that was asked to stop
