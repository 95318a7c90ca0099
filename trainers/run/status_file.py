"""Writing the status of a run beside its checkpoints, in a thread: nothing waits for the store or fails with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

from ...cluster.jobs.progress import dashboard
from ...config.run import Config
from ...errors import one_line
from ...reports.status import FILE, WRITE_EVERY_S, Status, status_folder, summary, write_status
from ...storage.base import Store
from ...storage.open import open_store
from . import events
from .evaluation import Evaluated
from .events import Event
from .heartbeat import repeated

log = logging.getLogger(__name__)

LOOK_S = 0.5  # between looks whether something is to be written
GAP_S = 5.0  # between two writes, however fast events come
TRIES, TIMEOUT_S = 2, 10.0  # of a request to S3
CHANGES = (
    events.EpochDone,
    events.CheckpointSaved,
    events.Training,
    events.WorkersLost,
    events.Waiting,
    events.NodeDraining,
    events.Stopping,
    Evaluated,
)


class Source(Protocol):
    """What knows how a run or study stands; `status` may be called from any thread. current: without the time left."""

    current: Status

    def status(self) -> Status:
        """The present status."""

    def end(self, error: BaseException | None) -> None:
        """The run has ended, by an error or not."""


class StatusFile:
    """Writes status.json every `WRITE_EVERY_S` seconds, and sooner after a change that a reader waits for.

    Args:
        also: called with what was written, for other places that show it.
    """

    def __init__(self, store: Store, source: Source, also: Callable[[Status], None] = lambda status: None) -> None:
        self.store, self.source, self.also = store, source, also
        self.written, self.stage, self.changed, self.failing = -GAP_S, "", True, False

    def __call__(self, event: Event) -> None:
        """Note an event that the source has taken into account."""
        stage = self.source.current.stage
        if isinstance(event, CHANGES) or stage != self.stage:
            self.stage, self.changed = stage, True

    def look(self) -> None:
        """Write if it is time to; never raises."""
        since = monotonic() - self.written
        if since >= (GAP_S if self.changed else WRITE_EVERY_S) or self.source.current.ended:
            self.write()

    def write(self) -> None:
        """Write the present status; a failure is reported once, and tried again later."""
        self.changed, self.written = False, monotonic()
        status = self.source.status()
        try:
            write_status(self.store, status)
            self.failing = False
        except Exception as error:  # of the store or its libraries: training must not fail
            if not self.failing:
                where, reason = f"{self.store.url}/{FILE}", one_line(error)
                log.warning("%s cannot be written (%s); training continues, and it is tried again", where, reason)
            self.failing = True
        self.also(status)


@contextmanager
def status_file(config: Config, source: Source) -> Iterator[StatusFile]:
    """Write the status of a run, or of a study with this base, while inside, and at the end how it ended.

    Ray's dashboard shows it too, if this process is the driver of a submitted job.
    """
    s3 = config.s3.model_copy(
        update={"max_attempts": min(config.s3.max_attempts, TRIES), "timeout_s": min(config.s3.timeout_s, TIMEOUT_S)}
    )
    store, show = open_store(status_folder(config.checkpoint_url), s3), dashboard()
    file = StatusFile(store, source, lambda status: show(summary(status), status.mlflow))
    with repeated(file.look, LOOK_S, "status-file", at_end=True):
        try:
            yield file
        except BaseException as error:
            source.end(error)
            raise
        source.end(None)
