"""Copy of the run folder beside checkpoints in remote storage, in case the driver's machine is lost too.

    s3://bucket/runs/NAME/checkpoints/...                              written by the workers
    s3://bucket/runs/NAME/{config.yaml, metrics.jsonl, model/, ...}    copied by the driver

The same command on another machine restores the copy and resumes with the same journal and MLflow run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ...config.run import Config
from ...errors import GlannError
from ...inference.package import MANIFEST
from ...reports import status
from ...reports.run_folder import CHECKPOINTS, CONFIG, JOURNAL, MODEL, RAY, TRACKING
from ...storage.base import Store, check_key
from ...storage.open import open_store
from ...tracking import tensorboard

log = logging.getLogger(__name__)

ELSEWHERE = (CHECKPOINTS, RAY, status.FILE)  # Ray's own files; the others are written there anyway


class RunMirror:
    """Copies changed files of a run folder in a background thread. Does nothing if the checkpoints are local."""

    def __init__(self, config: Config, copied: Callable[[str], bool] = lambda key: is_copied(key)) -> None:
        """`copied`: whether a key, relative to the run folder, is part of the copy."""
        self.folder, self.store, self.copied = config.run_dir, mirror_store(config), copied
        self.sent: dict[str, tuple[int, int]] = {}
        self.thread = ThreadPoolExecutor(1, "run-mirror")
        self.lock = threading.Lock()  # a file is read and sent as one, so that no older content is sent last
        self.sending: Future[None] | None = None

    def send_soon(self) -> None:
        """Start a copy unless one is in progress. A failed copy is logged and retried by the next call."""
        if self.store is None or (self.sending is not None and not self.sending.done()):
            return
        if self.sending is not None and (error := self.sending.exception()) is not None:
            log.info("the run folder was not copied to %s: %s", self.store.url, error)
        self.sending = self.thread.submit(self.send, self.store)

    def close(self, report: Callable[[str], None]) -> None:
        """Copy the remaining changes; a failure is passed to `report`."""
        self.thread.shutdown()
        if self.store is None:
            return
        try:
            self.send(self.store)
        except (GlannError, OSError) as error:
            report(f"the results could not be copied to {self.store.url}: {error}; the same command copies them")

    def complete(self, report: Callable[[str], None]) -> None:
        """Copy a finished run once more, but for a model that is there: the last copy may have failed."""
        manifest = f"{MODEL}/{MANIFEST}"
        with suppress(GlannError, OSError):
            if self.store and self.store.read(manifest) == (self.folder / manifest).read_bytes():
                copied, self.copied = self.copied, lambda key: copied(key) and not key.startswith(f"{MODEL}/")
        self.close(report)

    def send(self, store: Store) -> None:
        """Copy every file that has changed since its last copy."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and self.copied(self.key(path))]
        # The state of the outbox before the journal: a copy must not mark more entries as sent than it contains.
        for path in sorted(files, key=lambda path: (path.name != TRACKING, path.name != JOURNAL)):
            with self.lock:
                stat = path.stat()
                if self.sent.get(self.key(path)) != (stat.st_size, stat.st_mtime_ns):
                    store.write(self.key(path), path.read_bytes() if is_growing(path) else path)
                    self.sent[self.key(path)] = (stat.st_size, stat.st_mtime_ns)

    def send_now(self, path: Path) -> None:
        """Copy a file before anything depends on it. Raises UserError, EnvironmentFault: it could not be copied."""
        if self.store is not None:
            with self.lock:
                self.store.write(self.key(path), path.read_bytes())

    def key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def take_back(config: Config) -> bool:
    """Restore a missing run folder from its copy; True if there was one.

    Raises:
        UserError, EnvironmentFault: access is denied, or the store does not answer.
    """
    store = mirror_store(config)
    if store is None or (config.run_dir / CONFIG).exists():
        return False
    keys = [check_key(key) for key in store.list() if is_copied(key)]
    if not {CONFIG, JOURNAL, TRACKING} & {*keys}:
        return False
    for key in sorted(keys, key=lambda key: key == CONFIG):  # last: without it the copy is restored again
        path = config.run_dir / key
        path.parent.mkdir(parents=True, exist_ok=True)
        store.download(key, path)
    return True


def mirror_store(config: Config) -> Store | None:
    """The store of the copy; None if the checkpoints are in the run folder."""
    url = config.checkpoint_url.rpartition("/")[0]
    return None if Path(url).absolute() == config.run_dir.absolute() else open_store(url, config.s3)


def is_copied(key: str) -> bool:
    return key.partition("/")[0] not in ELSEWHERE and not any(part.startswith(".") for part in key.split("/"))


def is_growing(path: Path) -> bool:
    """Whether a file may be appended to while it is sent."""
    return path.suffix in (".jsonl", ".log") or path.parent.name == tensorboard.FOLDER
