"""Files at a url: a local folder or an `s3://bucket/prefix`, behind one small interface.

Everything that outlives a process (shards, indices, checkpoints) is written through a `Store`.
Its promises: an object is either there as a whole or not at all, a read of the wrong length is
never returned, a missing object is `MissingObject`, and no message holds a credential.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from ..config import S3Config
from ..errors import EnvironmentFault, GlannError, UserError

_READ_BYTES = 64 << 20
_TEMPORARY = ".glann-tmp-"  # prefix of files that are still being written; never listed, never read
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


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


def open_store(url: str, s3: S3Config | None = None) -> Store:
    """The store at a local folder (which need not exist yet) or at `s3://bucket/prefix`.

    Nothing is contacted here. `s3` says how S3 is reached; without it the defaults hold.
    """
    if not url or "\0" in url:
        raise UserError(f"{url!r} is not a place for files; give a folder or s3://bucket/prefix")
    if url.startswith("s3://"):
        from .s3 import S3Store  # boto3 takes half a second to import; local runs never pay it

        return S3Store(url, s3 or S3Config())
    if match := _SCHEME.match(url):
        if match[1].lower() != "file":
            raise UserError(f"{match[1]}:// addresses are not supported ({url}); use a folder or s3://bucket/prefix")
        url = url[len("file://") :]
    return LocalStore(url)


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


class LocalStore:
    """A folder. Writes go to a temporary file beside the target, are synced, then renamed."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.url = str(self.root)
        self._swept: set[Path] = set()

    def path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _own(self, key: str) -> Path:
        """The path of a key that may be changed: not one that a link inside the folder leads out of it."""
        path = self.path(key)
        if not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"{path.parent} is a link that leads out of {self.root}; remove it")
        return path

    def read(self, key: str) -> bytes:
        with self._faults(key):
            return self.path(key).read_bytes()

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with self._faults(key), open(self.path(key), "rb") as file:
            data = read_at(file.fileno(), offset, length)
        if len(data) != length:
            raise TruncatedObject(f"{self.path(key)} ends before byte {offset + length}")
        return data

    def write(self, key: str, data: Data, *, only_if_absent: bool = False) -> None:
        target = self._own(key)
        with self._faults(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent not in self._swept:
                sweep(target.parent)
                self._swept.add(target.parent)
            with temporary_beside(target) as temporary:
                _fill(temporary, data)
                if only_if_absent:
                    _link(temporary.name, target)
                else:
                    os.replace(temporary.name, target)
            _sync_folder(target.parent)

    def download(self, key: str, path: Path) -> None:
        with self._faults(key), temporary_beside(path) as temporary:
            _fill(temporary, self.path(key))
            os.replace(temporary.name, path)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file, not a folder")
        above = prefix.rpartition("/")[0]
        folder = self.path(above) if above else self.root
        if not folder.is_dir():
            return {}
        with self._faults(prefix):
            found = {os.path.relpath(path, self.root).replace(os.sep, "/"): size for path, size in _walk(str(folder))}
        return {key: found[key] for key in sorted(found) if key.startswith(prefix)}

    def list(self, prefix: str = "") -> list[str]:
        return list(self.sizes(prefix))

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def size(self, key: str) -> int:
        with self._faults(key):
            return self.path(key).stat().st_size

    def delete(self, key: str) -> None:
        with self._faults(key):
            path = self._own(key)
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty yet; object stores have no empty folders either
            for folder in path.parents[: len(Path(key).parts) - 1]:
                folder.rmdir()

    def sweep(self, prefix: str = "") -> None:
        with self._faults(prefix):
            for folder, _, names in os.walk(self.root):
                inside = os.path.relpath(folder, self.root).replace(os.sep, "/") + "/"
                if inside.removeprefix("./").startswith(prefix) and any(n.startswith(_TEMPORARY) for n in names):
                    sweep(Path(folder))

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        """Explain what the operating system reports."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingObject(f"no such file: {self.root / key}") from error
        except IsADirectoryError as error:
            raise UserError(f"{self.root / key} is a folder, not a file") from error
        except OSError as error:
            raise os_fault(error, self.root / key) from error


def os_fault(error: OSError, path: Path | str) -> GlannError:
    """The one-line error for what the operating system reported about `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFault(f"disk full while writing {path}; free some space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission for {path}: {error.strerror}")
    if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
        return UserError(f"{path} cannot be used: {error.strerror}")
    if error.errno == errno.EEXIST:
        return UserError(f"{path} cannot be made: a file is where a folder is needed")
    return EnvironmentFault(f"{path}: {error.strerror or error}")


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes from `offset`; fewer only where the file ends. Safe for concurrent use."""
    chunks, missing = [], length
    while missing > 0:
        # a part at a time: Python takes the memory first, and the length may be a stranger's
        chunk = os.pread(descriptor, min(missing, _READ_BYTES), offset + length - missing)
        if not chunk:
            break
        chunks.append(chunk)
        missing -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[IO[bytes]]:
    """A new file in the folder of `target`, open for writing; what is left under its name at the end is removed.

    The file is locked as long as it is open.  A process that is killed loses its lock, and so the
    next writer can tell its remains (`sweep`) from a file that is still being written.
    """
    while True:
        with open(target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}", "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:  # swept between its creation and its lock
                continue
            try:
                yield file
            finally:
                Path(file.name).unlink(missing_ok=True)
            return


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in `folder`."""
    for entry in os.scandir(folder):
        if entry.name.startswith(_TEMPORARY):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(entry.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)


def _fill(file: IO[bytes], data: Data) -> None:
    if isinstance(data, Path):
        with open(data, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
    else:
        for piece in [data] if isinstance(data, bytes) else data:
            file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def _link(temporary: str, target: Path) -> None:
    """Give a complete file its name unless that is taken; a rename would overwrite."""
    try:
        os.link(temporary, target)
    except FileExistsError as error:
        raise ObjectExists(f"{target} exists already") from error


def _walk(root: str) -> Iterator[tuple[str, int]]:
    """Path and size of every finished file below `root`, each folder once however it is linked.

    Others may remove files and folders meanwhile: those are left out. A link that leads nowhere is a fault.
    """
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unless_gone):
        here = _stat(folder)
        if here is None or (here.st_dev, here.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        subfolders.sort()
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(_TEMPORARY) and (found := _stat(path)):
                yield path, found.st_size


def _stat(path: str) -> os.stat_result | None:
    """What the system knows of a file; None where it was removed meanwhile."""
    try:
        return os.stat(path)
    except FileNotFoundError as error:
        _unless_gone(error)
        return None


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder do it on their own."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unless_gone(error: OSError) -> None:
    """Raise it, but for what was removed while it was looked at."""
    if not isinstance(error, FileNotFoundError) or os.path.lexists(error.filename):
        raise error
