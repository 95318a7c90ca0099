"""The interface of every store, and its errors.

Everything that outlives a process (shards, indices, checkpoints) is written through a `Store`.
Guarantees: writes are atomic, a read of the wrong length is never returned, a missing object
raises `MissingObject`, and no message contains a credential.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from ..config.address import S3, address_fault, local_path
from ..errors import EnvironmentFault, UserError

Data = bytes | Path | Iterator[memoryview]  # bytes, a local file, or a stream of pieces


class MissingObject(UserError):
    """No object has that key."""


class TruncatedObject(EnvironmentFault):
    """The object ends before the requested bytes."""


class ObjectExists(UserError):
    """`write(..., only_if_absent=True)` found an existing object, which is unchanged."""


class Entry(NamedTuple):
    """An object in a listing: its key, its size in bytes, and why it cannot be read, if so."""

    key: str
    size: int
    fault: str = ""


class Store(Protocol):
    """Objects below one URL. Keys are relative paths with forward slashes that stay below the URL.

    What is written follows `check_key`; what others have named is read by whatever name it has in a listing.
    """

    url: str

    def read(self, key: str) -> bytes:
        """The whole object. Raises MissingObject."""

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises MissingObject, or TruncatedObject if the object is shorter."""

    def write(self, key: str, data: Data, *, only_if_absent: bool = False) -> None:
        """Store bytes, the contents of a local file, or a stream of pieces, atomically.

        Of a stream only a few parts are in memory at a time. With `only_if_absent`, raises ObjectExists if the
        key is taken; after a lost response and a retry, the existing object may be the one just written.
        """

    def download(self, key: str, path: Path) -> None:
        """Copy the object to the local file `path`, atomically."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Size in bytes of every object whose key starts with `prefix`, sorted by key."""

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Everything whose key starts with `prefix`, in one pass and in no order, also what cannot be read.

        Such are links to nothing, and on local disks pipes, sockets and devices, which have a key that looks like
        a file's. All other listings leave out pipes, sockets and devices, and raise UserError for a link to nothing.
        """

    def list(self, prefix: str = "") -> list[str]:
        """Sorted keys that start with `prefix`; empty if there are none."""

    def exists(self, key: str) -> bool:
        """Whether the object exists."""

    def size(self, key: str) -> int:
        """Size of the object in bytes. Raises MissingObject."""

    def delete(self, key: str) -> None:
        """Delete the object; no error if it does not exist."""

    def sweep(self, prefix: str = "") -> None:
        """Remove unfinished writes of killed processes below `prefix`; call only while no process writes there.

        Empty folders are such writes too.
        """


def check_key(key: str) -> str:
    """Return the key if an object may be written by it on any system, else raise UserError."""
    if "\\" in key:
        raise _unusable(key)
    return check_inside(key)


def check_inside(key: str) -> str:
    """Return the key if the local file that others named so lies inside its folder, else raise UserError."""
    if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise _unusable(key)
    return key


def _unusable(key: str) -> UserError:
    return UserError(f"{key!r} is not a usable file name: it must be relative and stay inside its folder")


def split_url(url: str) -> tuple[str, str]:
    """The parent URL and the file name of the URL of one file. Raises UserError if it is no address of a file."""
    if fault := address_fault(url):
        raise UserError(fault)
    trimmed = url.rstrip("/")
    parent, _, name = trimmed.rpartition("/")
    if trimmed.startswith(S3):
        if parent == "s3:/":
            raise UserError(f"{url} names a bucket, not a file in it")
        return parent, name
    path = local_path(trimmed)
    return str(path.parent), path.name
