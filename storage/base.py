"""The contract of every store, and its errors.

Everything that outlives a process (shards, indices, checkpoints) is written through a `Store`.
Its promises: an object is either there as a whole or not at all, a read of the wrong length is
never returned, a missing object is `MissingObject`, and no message holds a credential.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..errors import EnvironmentFault, UserError

Data = bytes | Path | Iterator[memoryview]  # bytes, a local file, or a stream of pieces


class MissingObject(UserError):
    """There is no object of that key."""


class TruncatedObject(EnvironmentFault):
    """The object ends before the bytes that were asked for."""


class ObjectExists(UserError):
    """`write(..., only_if_absent=True)` found the key taken; what is stored was left alone."""


class Store(Protocol):
    """Objects below one url. Keys are relative, with forward slashes, and never leave the url."""

    url: str

    def read(self, key: str) -> bytes:
        """The whole object. Raises MissingObject."""

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises MissingObject, or TruncatedObject when it is shorter."""

    def write(self, key: str, data: Data, *, only_if_absent: bool = False) -> None:
        """Store bytes, the contents of a local file, or a stream of pieces, atomically.

        A stream of any length is held a few parts at a time. Raises ObjectExists if `only_if_absent`; such
        a write may also meet what it stored itself, where an answer was lost and the request repeated.
        """

    def download(self, key: str, path: Path) -> None:
        """Copy the object to the local file `path`, which appears only once it is complete."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object whose key starts with `prefix`, in the order of the keys."""

    def list(self, prefix: str = "") -> list[str]:
        """Sorted keys that start with `prefix`; empty where nothing is stored."""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""

    def size(self, key: str) -> int:
        """Bytes of the object. Raises MissingObject."""

    def delete(self, key: str) -> None:
        """Remove the object; one that is already gone is not an error."""

    def sweep(self, prefix: str = "") -> None:
        """Remove what writers that were killed left unfinished below `prefix`: only for when nobody writes there."""


def check_key(key: str) -> str:
    """The key itself, if it is relative and stays inside its store; else a UserError."""
    parts = key.split("/")
    if not key or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{key!r} is not a usable file name: it must be relative and stay inside its folder")
    return key


def split_url(url: str) -> tuple[str, str]:
    """The parent url and the last name of a url that points at one file."""
    trimmed = url.rstrip("/")
    parent, _, name = trimmed.rpartition("/")
    if trimmed.startswith("s3://"):
        if parent in ("s3:/", ""):
            raise UserError(f"{url} names a bucket, not a file in it")
        return parent, name
    path = Path(trimmed)
    return str(path.parent), path.name
