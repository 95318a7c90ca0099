"""A copy of the run folder beside its checkpoints, where these lie elsewhere: the driver's machine may be lost too.

    s3://bucket/runs/NAME/checkpoints/...                              written by the workers
    s3://bucket/runs/NAME/{config.yaml, metrics.jsonl, model/, ...}    copied by the driver

The same command on another machine takes the copy back and goes on with the same journal and MLflow run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ...config.run import Config
from ...errors import GlannError
from ...reports.run_folder import CHECKPOINTS, CONFIG, JOURNAL, RAY, TRACKING
from ...storage.base import Store, check_key
from ...storage.open import open_store

log = logging.getLogger(__name__)

ELSEWHERE = (CHECKPOINTS, RAY)  # the run's checkpoints, and what Ray keeps for itself


class RunMirror:
    """Copies what is new in a run folder, in a thread of its own. Does nothing where there is no other place."""

    def __init__(self, config: Config, copied: Callable[[str], bool] = lambda key: is_copied(key)) -> None:
        """`copied`: whether the file of that key, relative to the run folder, is part of the copy."""
        self.folder, self.store, self.copied = config.run_dir, mirror_store(config), copied
        self.sent: dict[str, tuple[int, int]] = {}
        self.thread = ThreadPoolExecutor(1, "run-mirror")
        self.sending: Future[None] | None = None

    def send_soon(self) -> None:
        """Begin to copy, unless a copy is being made. A store that is away is tried again the next time."""
        if self.store is None or (self.sending is not None and not self.sending.done()):
            return
        if self.sending is not None and (error := self.sending.exception()) is not None:
            log.info("the run folder was not copied to %s: %s", self.store.url, error)
        self.sending = self.thread.submit(self.send, self.store)

    def close(self, say: Callable[[str], None]) -> None:
        """Copy the rest, and say so if it cannot be."""
        self.thread.shutdown()
        if self.store is None:
            return
        try:
            self.send(self.store)
        except (GlannError, OSError) as error:
            say(f"the run folder {self.folder} could not be copied to {self.store.url} as well: {error}")

    def send(self, store: Store) -> None:
        """Copy every file that has changed since it was copied last."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and self.copied(self.key(path))]
        # What MLflow has been told comes before the journal: a copy must not claim more as sent than it holds.
        for path in sorted(files, key=lambda path: (path.name != TRACKING, path.name != JOURNAL)):
            stat = path.stat()
            if self.sent.get(self.key(path)) != (stat.st_size, stat.st_mtime_ns):
                growing = path.name == JOURNAL
                store.write(self.key(path), path.read_bytes() if growing else path)
                self.sent[self.key(path)] = (stat.st_size, stat.st_mtime_ns)

    def key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def take_back(config: Config) -> bool:
    """Fill a run folder that is not there from its copy; whether there was one.

    Raises:
        UserError, EnvironmentFault: the store refuses or does not answer.
    """
    store = mirror_store(config)
    if store is None or (config.run_dir / CONFIG).exists():
        return False
    keys = [check_key(key) for key in store.list() if is_copied(key)]
    if not {CONFIG, JOURNAL, TRACKING} & {*keys}:
        return False
    for key in sorted(keys, key=lambda key: key == CONFIG):  # last: without it the folder is filled again
        path = config.run_dir / key
        path.parent.mkdir(parents=True, exist_ok=True)
        store.download(key, path)
    return True


def mirror_store(config: Config) -> Store | None:
    """Where the copy lies; None where the checkpoints are in the run folder."""
    url = config.checkpoint_url.rpartition("/")[0]
    return None if Path(url).absolute() == config.run_dir.absolute() else open_store(url, config.s3)


def is_copied(key: str) -> bool:
    return key.partition("/")[0] not in ELSEWHERE and not any(part.startswith(".") for part in key.split("/"))
