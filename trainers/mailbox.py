"""How workers speak to the driver: one small actor, so that a single place logs, draws and tracks."""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import Any

PROGRESS_EVERY = 0.5  # seconds; a bar needs no more


class Mailbox:
    """Actor between workers and driver: events one way, the wish to stop the other way."""

    def __init__(self) -> None:
        self.events: deque[dict[str, Any]] = deque()
        self.stopping = False

    def send(self, event: dict[str, Any]) -> bool:
        """Keep an event for the driver; True if the run should stop."""
        self.events.append(event)
        return self.stopping

    def drain(self) -> list[dict[str, Any]]:
        """Hand over all events so far, oldest first."""
        events, self.events = list(self.events), deque()
        return events

    def stop(self) -> None:
        """Ask the workers to save and stop."""
        self.stopping = True


class Reporter:
    """A worker's end of the mailbox. Sending never waits."""

    def __init__(self, mailbox: Any, rank: int) -> None:
        self.mailbox, self.rank = mailbox, rank
        self.last_progress = 0.0
        self.answer: Any = None
        self.stopping = False

    def send(self, kind: str, **event: Any) -> None:
        self.answer = self.mailbox.send.remote({"kind": kind, "rank": self.rank} | event)

    def progress(self, **event: Any) -> None:
        """Send a progress event unless one was sent just before."""
        now = monotonic()
        if now - self.last_progress >= PROGRESS_EVERY:
            self.last_progress = now
            self.send("progress", **event)

    def stop_requested(self) -> bool:
        """Whether an answer that has arrived said so; never waits."""
        import ray

        if self.answer is not None and not self.stopping:
            ready, _ = ray.wait([self.answer], timeout=0)
            if ready:
                self.stopping = ray.get(ready[0])
                self.answer = None
        return self.stopping

    def fatal(self, error: Exception) -> None:
        """Tell the driver to end the run with this error, and wait until it has been told."""
        import ray

        ray.get(self.mailbox.send.remote({"kind": "fatal", "rank": self.rank, "error": error}))
