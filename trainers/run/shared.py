"""The copy of a run folder in shared storage (`mirror`), as other machines see it: is it finished, and bring it home.

The driver of a job is on the cluster's head, whose paths mean nothing elsewhere and end with it. So what a job prints
at its end, `glann submit` of a finished run and `glann jobs fetch` name this copy.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...cluster.checkpoints.best import LAST
from ...cluster.jobs.shipping import JOB_VARIABLE
from ...config.run import Config
from ...errors import UserError, redact
from ...inference.package import MANIFEST
from ...reports.run_folder import CONFIG, IMAGES, MODEL, REPORT, STUDY, SUMMARY, TRACKING, parse_config
from ...storage.base import MissingObject, Store, check_key
from ...storage.files import READ_BYTES, os_fault
from ...storage.journal import strict_json
from ...tracking.outbox import OutboxState
from .folder import differences
from .mirror import is_copied, mirror_store

MODEL_FILES = f"{MODEL}/{MANIFEST}"  # names the hashes of the files beside it
QUICK = {"max_attempts": 2, "timeout_s": 5.0}  # of S3, where storage may be out of reach and is not needed


def is_job() -> bool:
    """Whether this process is a job of `glann submit`, on the head of a cluster."""
    return JOB_VARIABLE in os.environ


# What is there -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A finished run, or study, in shared storage. look: addresses of results. commands: what to do with them. owed:
    whether MLflow lacks a part of it."""

    look: list[str]
    commands: list[str]
    owed: bool

    def lines(self) -> list[str]:
        """What to print of it."""
        return ["look at", *(f"  {line}" for line in self.look), "try next", *(f"  {line}" for line in self.commands)]


def finished(config: Config) -> Finished | None:
    """The run of this configuration if shared storage holds its end; None if it is not finished, or not there.

    Raises:
        OtherRun: the name belongs to a run of another configuration, or to a study.
        UserError, EnvironmentFault: the storage cannot be read from here; it is not tried for long.
    """
    store = quick_store(config)
    if store is None or not store.exists(CONFIG):
        return None
    if store.exists(STUDY):
        raise OtherRun(f"{store.url} holds a study of that name; give this run another --name")
    refuse_other(store, config)
    if not (store.exists(REPORT) and store.exists(SUMMARY)) or used(store) != config.checkpoint.use:
        return None
    owed = config.tracking.enabled and is_owed(store)
    return Finished(addresses(config, page_of(store)), commands(config), owed)


def used(store: Store) -> str:
    """Which checkpoint a finished run was packaged from (`checkpoint.use`); empty if its summary is damaged."""
    try:
        return str(strict_json(store.read(SUMMARY)).get("use", LAST))
    except (ValueError, AttributeError, RecursionError):
        return ""  # the driver finishes such a run anew, and says so


class OtherRun(UserError):
    """The name of a run belongs to another one."""


class NoResults(UserError):
    """There is no copy of a run folder at that address."""


def quick_store(config: Config) -> Store | None:
    """The store of the copy, for a look that is not waited for."""
    return mirror_store(config.model_copy(update={"s3": config.s3.model_copy(update=QUICK)}))


def refuse_other(store: Store, config: Config) -> None:
    """Raise OtherRun if the copy is of a run of another configuration."""
    if differing := differences(parse_config(store.read(CONFIG), f"{store.url}/{CONFIG}"), config):
        raise OtherRun(f"{store.url} holds a run of another configuration: {differing[0]}; give another --name")


def page_of(store: Store) -> str:
    """The page of the run in MLflow, by its copy; empty if it has none."""
    try:
        return OutboxState.model_validate(_document(store, TRACKING)).link or ""
    except ValidationError:  # not tracked, or damaged
        return ""


def is_owed(store: Store) -> bool:
    """Whether MLflow lacks a part of the run, by its copy."""
    return store.exists(TRACKING) and _document(store, TRACKING).get("ended") is not True


def _document(store: Store, key: str) -> dict[str, Any]:
    """A small JSON object of the copy; empty if it is damaged, which the run itself reports."""
    try:
        found = strict_json(store.read(key))
    except (ValueError, RecursionError, MissingObject):
        return {}
    return found if isinstance(found, dict) else {}


# What is said of it --------------------------------------------------------------------------


def addresses(config: Config, link: str) -> list[str]:
    """Where a user of any machine sees the results: the page in MLflow, and files in shared storage."""
    url = shared_url(config)
    return [*([link] if link else []), f"{url}/{REPORT}", f"{url}/{IMAGES}/samples.png"]


def commands(config: Config) -> list[str]:
    """What to do with the results on any machine."""
    url, endpoint = shared_url(config), endpoint_option(config)
    sample = ["glann", "sample", url, "--n", "100", "--seed", "1", "--out", "more.png", *endpoint]
    return [fetch_command(config), shlex.join(sample)]


def fetch_command(config: Config) -> str:
    """The command that copies the results to another machine, also when the cluster is gone."""
    parent = shared_url(config).rpartition("/")[0]
    return shlex.join(["glann", "jobs", "fetch", config.name, "--runs", parent, *endpoint_option(config)])


def endpoint_option(config: Config) -> list[str]:
    return ["--endpoint-url", config.s3.endpoint_url] if config.s3.endpoint_url else []


def shared_url(config: Config) -> str:
    """The address of the copy of a run folder, or study folder."""
    return redact(config.checkpoint_url.rpartition("/")[0])


# Bring it home -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fetched:
    """Numbers of files that were copied, and that were there already; bytes copied; whether the run has finished."""

    copied: int
    kept: int
    size: int
    finished: bool


def fetch(
    store: Store,
    folder: Path,
    overwrite: bool = False,
    wanted: Callable[[str], bool] = lambda key: True,
    show: Callable[[int, int], None] = lambda done, size: None,
) -> Fetched:
    """Copy a run folder, or study folder, from shared storage. An interrupted copy is completed by another call.

    Args:
        store: of the copy. overwrite: replace files that differ. wanted: of the keys of the copy. show: called with
            bytes copied, and to be copied.
    Raises:
        UserError: there is nothing at that address, or `folder` has files that differ; nothing is copied then.
    """
    sizes = {check_key(key): size for key, size in store.sizes().items() if is_copied(key) and wanted(key)}
    if CONFIG not in sizes:
        raise NoResults(f"{store.url} holds no results of a run; check NAME and --runs, which is its checkpoint.url")
    hashes = _hashes(store) if MODEL_FILES in sizes else {}
    there = {key for key in sizes if os.path.lexists(folder / key)}
    same = {key for key in there if _is_same(store, key, sizes[key], folder / key, hashes.get(key))}
    if (differing := sorted(there - same)) and not overwrite:
        more = f" and {len(differing) - 3} more differ" if len(differing) > 3 else ""
        raise UserError(
            f"{folder} has other files than {store.url}: {', '.join(differing[:3])}{more}; name another DEST, or give "
            "--overwrite to replace them"
        )
    missing = sorted(sizes.keys() - same, key=lambda key: (key == CONFIG, key))  # last: with it, it is a run folder
    done, total = 0, sum(sizes[key] for key in missing)
    for key in missing:
        try:
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_fault(error, folder / key) from error
        store.download(key, folder / key)
        done += sizes[key]
        show(done, total)
    return Fetched(len(missing), len(same), done, REPORT in sizes)


def _hashes(store: Store) -> dict[str, str]:
    """SHA-256 of the model's files by key, so that large ones that are here need not be read there."""
    files = _document(store, MODEL_FILES).get("files")
    entries = files.items() if isinstance(files, dict) else ()
    return {f"{MODEL}/{name}": str(entry.get("sha256")) for name, entry in entries if isinstance(entry, dict)}


def _is_same(store: Store, key: str, size: int, path: Path, digest: str | None) -> bool:
    """Whether a local file has the content of the object."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    try:
        with path.open("rb") as file:
            if digest is not None:
                return file_digest(file, "sha256").hexdigest() == digest
            return all(file.read(len(piece)) == piece for piece in _pieces(store, key, size))
    except OSError as error:
        raise os_fault(error, path) from error


def _pieces(store: Store, key: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, READ_BYTES):
        yield store.read_range(key, start, min(READ_BYTES, size - start))
