"""Local files: written whole or not at all, and the operating system's errors in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import EnvironmentFault, GlannError, UserError
from .base import Data

READ_BYTES = 64 << 20


TEMPORARY = ".glann-tmp-"  # prefix of files that are still being written; never listed, never read


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
        chunk = os.pread(descriptor, min(missing, READ_BYTES), offset + length - missing)
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
        with open(target.parent / f"{TEMPORARY}{uuid.uuid4().hex}", "xb") as file:
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
        if entry.name.startswith(TEMPORARY):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(entry.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)


def fill(file: IO[bytes], data: Data) -> None:
    if isinstance(data, Path):
        with open(data, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
    else:
        for piece in [data] if isinstance(data, bytes) else data:
            file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder do it on their own."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
