"""Description and verification of a packed data set: `glann data info` and `glann data verify`."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config.sections import S3Config
from ..errors import UserError
from ..storage.base import MissingObject, Store, TruncatedObject
from ..storage.files import read_at
from ..storage.local import LocalStore
from ..storage.open import open_store
from .assets.catalogue import ASSETS
from .codec import BadImage, decode_packed
from .index import HELD_OUT, LABELS_FILE, Index, Shard, held_out_url
from .labels import column_names
from .left_out import in_words, remarks_in_words
from .sources.archives import tar_members

Progress = Callable[[int, int], None]  # images checked, images in all


@dataclass(frozen=True)
class Fault:
    """One fault of a data set."""

    shard: str
    key: str  # member name, or "" for the whole shard
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}" if self.key else f"{self.shard}: {self.reason}"


def describe(url: str, s3: S3Config | None = None) -> dict[str, Any]:
    """The facts of the index at `url`, as JSON-compatible values. Only the index is read."""
    index = Index.load(url, s3)
    length_N = index.records_N["length"]
    columns = index.labels.columns if index.labels else ()
    besides = {
        "held_out": index.held_out.rows if index.held_out else 0,
        "labels": column_names(columns),
        "left_out": in_words(index.header.left_out),
        "remarks": remarks_in_words(index.header.remarks),
        "credit": ASSETS[index.asset].attribution() if index.asset in ASSETS else "",
    }
    return {
        "name": index.name,
        "url": url,
        "images": index.rows,
        "resolution": index.resolution,
        "channels": index.channels,
        "format": index.image_format,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "largest_shard_bytes": max(shard.bytes for shard in index.shards),
        "image_bytes_mean": float(length_N.mean(dtype=np.float64)),
        "image_bytes_max": int(length_N.max()),
        "fingerprint": index.fingerprint,
    } | {key: words for key, words in besides.items() if words}


def verify(url: str, s3: S3Config | None = None, progress: Progress | None = None) -> list[Fault]:
    """Check everything: hash and member names of each shard, hash and pixels of each image, labels, the held-out part.

    Args:
        progress: called with images checked and images in all, after each shard.
    Returns:
        All faults; an empty list means that the data set is intact.
    Raises:
        UserError: the index itself cannot be used.
    """
    index = Index.load(url, s3)
    held_out = index.held_out.rows if index.held_out else 0
    done = lambda checked: progress(checked, index.rows + held_out) if progress else None  # noqa: E731
    faults = _check_part(index, open_store(url, s3), done)
    if not index.held_out:
        return faults
    store = open_store(held_out_url(url), s3)
    try:
        part = index.load_held_out(store)
    except UserError as error:
        return [*faults, Fault(HELD_OUT, "", str(error))]
    of_part = _check_part(part, store, lambda checked: done(index.rows + checked))
    return faults + [replace(fault, shard=f"{HELD_OUT}/{fault.shard}") for fault in of_part]


def _check_part(index: Index, store: Store, done: Callable[[int], None]) -> list[Fault]:
    """All faults of one packed data set. `done` is called with the number of images checked."""
    faults: list[Fault] = []
    for number, shard in enumerate(index.shards):
        first = int(index.first_S[number])
        with tempfile.TemporaryDirectory(prefix="glann-verify-") as folder:
            try:
                path = _local(store, shard.file, Path(folder))
            except (MissingObject, TruncatedObject) as error:
                faults.append(Fault(shard.file, "", str(error)))
            else:
                faults += _check_shard(index, shard, first, path)
        done(first + shard.rows)
    try:
        index.read_labels(store)
    except UserError as error:
        faults.append(Fault(LABELS_FILE, "", str(error)))
    return faults


def _local(store: Store, file_name: str, folder: Path) -> Path:
    """The shard as a local file: itself, or a copy in `folder`."""
    if isinstance(store, LocalStore):
        store.size(file_name)
        return store.path(file_name)
    store.download(file_name, folder / file_name)
    return folder / file_name


def _check_shard(index: Index, shard: Shard, first: int, path: Path) -> list[Fault]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, io.SEEK_END)
        faults = []
        if size != shard.bytes:
            faults.append(Fault(shard.file, "", f"{size} bytes long, not {shard.bytes}"))
        elif digest != shard.sha256:
            faults.append(Fault(shard.file, "", "wrong SHA-256"))
        reasons = ((row, _check_image(index, row, file.fileno())) for row in range(first, first + shard.rows))
        faults += [Fault(shard.file, index.key(row), reason) for row, reason in reasons if reason]
    return faults + _check_names(index, shard, first, path)


def _check_image(index: Index, row: int, descriptor: int) -> str:
    """The fault of the image of `row`, or an empty string."""
    record = index.records[row]
    data = read_at(descriptor, int(record["offset"]), int(record["length"]))
    if len(data) != record["length"]:
        return "beyond the end of the shard"
    if hashlib.sha256(data).digest() != record["sha256"].tobytes():
        return "wrong SHA-256"
    try:
        decode_packed(data, index.resolution, index.channels, index.image_format)
    except BadImage as error:
        return str(error)
    return ""


def _check_names(index: Index, shard: Shard, first: int, path: Path) -> list[Fault]:
    """Check that members are the plain files of the index, in its order: other readers rely on the names."""
    try:
        with open(path, "rb") as file:
            names = [(member.name, member.isreg()) for member in tar_members(file, shard.file)]
    except UserError as error:
        return [Fault(shard.file, "", str(error))]
    expected = [(index.key(row), True) for row in range(first, first + shard.rows)]
    if names == expected:
        return []
    known = set(expected)
    strange = [name for name in names if name not in known]
    if strange:
        return [Fault(shard.file, name, "a member that is not in the index") for name, _ in strange]
    return [Fault(shard.file, "", f"{len(names)} members in another order or number than the {shard.rows} indexed")]
