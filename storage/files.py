"""Local files: atomic writes, and operating-system errors as one-line messages."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import EnvironmentFault, GlannError, UserError
from .base import Data

READ_BYTES = 64 << 20
MAX_DOCUMENT = 4 << 20  # bytes of a settings or metadata file; ours have a few thousand
TEMPORARY = ".glann-tmp-"  # prefix of files and folders being written; never listed or read
ATTEMPTS = 100  # at a folder that other processes remove whenever it is empty

_swept: set[Path] = set()  # folders that this process has cleared of the remains of killed writers


def os_fault(error: OSError, path: Path | str) -> GlannError:
    """The one-line error for an operating-system error on `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFault(f"disk full while writing {path}; free some space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission for {path}: {error.strerror}; make it accessible, or name another place")
    if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
        return UserError(f"{path} cannot be used: {error.strerror}")
    if error.errno == errno.EEXIST:
        return UserError(f"{path} cannot be made: a file is where a folder is needed")
    return EnvironmentFault(f"{path}: {error.strerror or error}")


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes from `offset`; fewer only at the end of the file. Safe for concurrent use."""
    chunks, missing = [], length
    while missing > 0:
        # in parts: Python allocates the memory first, and the length may come from an untrusted file
        chunk = os.pread(descriptor, min(missing, READ_BYTES), offset + length - missing)
        if not chunk:
            break
        chunks.append(chunk)
        missing -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class NotRegular(ValueError):
    """A pipe or a device, which would block the reader or never end."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading. Raises OSError, or NotRegular."""
    nonblocking = lambda name, flags: os.open(name, flags | os.O_NONBLOCK)  # a pipe would block  # noqa: E731
    file = open(path, "rb", opener=nonblocking)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotRegular("it is not a regular file")
    return file


def read_document(path: Path, limit: int = MAX_DOCUMENT) -> bytes:
    """Read a small file.

    Raises:
        ValueError: more than `limit` bytes, or not a regular file. OSError: it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def write_whole(path: Path, data: str | bytes | Callable[[IO[bytes]], None], *, durable: bool = True) -> None:
    """Write a local file atomically: until the new file is complete, `path` keeps its former content.

    Text is encoded as UTF-8. A symbolic link at `path` is replaced, not followed.

    Args:
        data: the content, or a function that writes it to an open file.
        durable: sync to disk, so that the file also survives a power failure. False only for large numbers of
            files that are not read back by name.
    Raises:
        UserError, EnvironmentFault: the operating-system error in one line.
    """
    try:
        folder = path.absolute().parent
        if folder not in _swept:
            sweep(folder)
            _swept.add(folder)
        with replacing(path, durable=durable) as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise os_fault(error, path) from error


@contextlib.contextmanager
def replacing(target: Path, *, durable: bool = True, parents: bool = False) -> Iterator[IO[bytes]]:
    """A temporary file that replaces `target` when the block ends without an error. Raises OSError."""
    with temporary_beside(target, parents=parents) as file:
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
        os.replace(file.name, target)
    if durable:
        sync_folder(target.parent)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that replaces `target` when the block ends without an error.

    The exchange is atomic where the file system supports it (local Linux file systems do, NFS does not);
    elsewhere `target` is missing for an instant between two renames.

    Raises:
        OSError: also if `target` is a file or a link.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    folder = _locked_folder(target.parent)
    try:
        yield folder.path
        sync_folder(folder.path)
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, "it is a file or a link where a folder is needed", str(target))
        _exchange(folder.path, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)  # the unfinished folder, or the former one
        os.close(folder.descriptor)


class _Locked(NamedTuple):
    path: Path
    descriptor: int


def _locked_folder(parent: Path) -> _Locked:
    while True:
        path = parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # NFS cannot lock a folder; folders are not swept there either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return _Locked(path, descriptor)
        os.close(descriptor)  # swept between its creation and its lock


def _exchange(new: Path, target: Path) -> None:
    """Rename `new` to `target`; a former `target` becomes `new`."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchanged(new, target):
        aside = new.with_name(f"{new.name}-old")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(aside, target)
            raise
        os.rename(aside, new)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names atomically (Linux's renameat2); False where this is not supported."""
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


@contextlib.contextmanager
def temporary_beside(target: Path, *, parents: bool = False) -> Iterator[IO[bytes]]:
    """A temporary file in the folder of `target`, open for writing; removed at the end unless it was renamed.

    The file is locked while it is open.  A killed process loses its lock, so `sweep` can distinguish
    its remains from a file that is still being written.

    Args:
        parents: make missing folders; after an error, those that are still empty are removed.
    """
    missing = [folder for folder in target.parents if parents and not os.path.exists(folder)]
    try:
        while True:
            with _open_beside(target, parents) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.fstat(file.fileno()).st_nlink:  # swept between its creation and its lock
                    continue
                try:
                    yield file
                finally:
                    Path(file.name).unlink(missing_ok=True)
                return
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # not there, or no longer empty
                folder.rmdir()
        raise


def _open_beside(target: Path, parents: bool) -> IO[bytes]:
    """A new file in the folder of `target`. From then on the folder is not empty, so no other process removes it."""
    attempts = ATTEMPTS if parents else 1
    while True:
        attempts -= 1
        try:
            if parents:
                target.parent.mkdir(parents=True, exist_ok=True)
            return open(target.parent / f"{TEMPORARY}{uuid.uuid4().hex}", "xb")
        except (FileExistsError, FileNotFoundError):  # the empty folder was removed between two of these calls
            if not attempts:
                raise


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed writers from `folder`, where permissions allow it."""
    for entry in os.scandir(folder):
        if not entry.name.startswith(TEMPORARY):
            continue
        # NFS grants an exclusive lock only on files open for writing, which folders cannot be
        flags = os.O_RDONLY if entry.is_dir(follow_symlinks=False) else os.O_RDWR | os.O_NOFOLLOW
        with contextlib.suppress(OSError):  # removed, still being written, or owned by another user
            descriptor = os.open(entry.path, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            finally:
                os.close(descriptor)


def fill(file: IO[bytes], data: Data) -> None:
    if isinstance(data, Path):
        with open_regular(data) as source:
            shutil.copyfileobj(source, file, 1 << 20)
    else:
        for piece in [data] if isinstance(data, bytes) else data:
            file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def sync_tree(path: Path) -> None:
    """Sync a file, or a folder with its content, to disk."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if each.is_dir():
            sync_folder(each)
        else:
            with open(each, "rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it are durable; not needed on file systems that do not support it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
