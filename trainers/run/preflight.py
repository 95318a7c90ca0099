"""Checks before a run starts, so that it does not fail later: data, configuration and exclusive use."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...config.run import Config, has_trait
from ...config.section import Trait
from ...datasets.fit import require_fit
from ...datasets.index import Index
from ...errors import UserError
from ...metrics.reference import held_out_images

if TYPE_CHECKING:
    from rich.console import Console

LOCK = ".lock"


def open_data(config: Config, console: Console) -> Index:
    """The index of the data set, packed first if `data.source` is set and there is no data yet.

    Raises:
        UserError: the data does not exist, or does not match the configured resolution, channels or number of rows;
            or so the held-out images.
    """
    data = config.data
    if data.source and not is_packed(config):
        from ...datasets.pack import pack, summary

        console.print(f"packing {data.source} into {data.url}", markup=False)
        index = pack(
            data.source,
            data.url,
            resolution=data.resolution,
            channels=data.channels,
            workers=data.threads,
            s3=config.s3,
        )
        console.print(summary(index, data.url), markup=False)
    index = Index.load(data.url, config.s3)
    require_fit(index, data, config.cluster.max_workers)
    held_out_images(config, index)  # refused now, and not after the training
    return index


def is_packed(config: Config) -> bool:
    """Whether `data.url` holds a complete data set."""
    from ...storage.open import open_store

    return open_store(config.data.url, config.s3).exists("index.json")


def may_change(key: str) -> bool:
    """Whether a run may be resumed with another value of this key."""
    return has_trait(key, Trait.RESUMABLE)


@contextmanager
def sole_command(folder: Path, command: str) -> Iterator[None]:
    """Lock the folder of a run or study against other commands.

    Raises:
        UserError: another command holds the lock.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another `glann {command}` is working on {folder}; wait for it, or choose another name"
            ) from error
        yield


def is_worked_on(run_dir: Path) -> bool:
    """Whether a command, or a trial of a study, is working on the run folder."""
    if not (run_dir / LOCK).exists():
        return False
    with (run_dir / LOCK).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
