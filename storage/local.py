"""The store of a local folder."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..config.paths import expand
from ..errors import UserError
from .base import Data, Entry, MissingObject, ObjectExists, TruncatedObject, check_inside, check_key
from .files import (
    TEMPORARY,
    NotRegular,
    fill,
    open_regular,
    os_fault,
    read_at,
    replacing,
    sweep,
    sync_folder,
    temporary_beside,
)

LINK = "a link to"
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class LocalStore:
    """Files in a folder. A write goes to a temporary file beside the target, is synced, then renamed."""

    def __init__(self, root: str | Path):
        self.root = expand(root)
        self.url = str(self.root)
        self._swept: set[Path] = set()

    def path(self, key: str) -> Path:
        """The path of a key for reading."""
        return self.root / check_inside(key)

    def _own(self, key: str) -> Path:
        """The path of a key for writing; raises UserError if a link inside the folder leads out of it."""
        path = self.path(check_key(key))
        # resolve() raises at a loop of links
        folder, root = (Path(os.path.realpath(place)) for place in (path.parent, self.root))
        if not folder.is_relative_to(root):
            raise UserError(f"{path.parent} is a link that leads out of {self.root}; remove it")
        return path

    def read(self, key: str) -> bytes:
        with self._faults(key), open_regular(self.path(key)) as file:
            return file.read()

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with self._faults(key), open_regular(self.path(key)) as file:
            data = read_at(file.fileno(), offset, length)
        if len(data) != length:
            raise TruncatedObject(f"{self.path(key)} ends before byte {offset + length}")
        return data

    def write(self, key: str, data: Data, *, only_if_absent: bool = False) -> None:
        target = self._own(key)
        with self._faults(key):
            if target.parent not in self._swept:
                with contextlib.suppress(FileNotFoundError):
                    sweep(target.parent)
                self._swept.add(target.parent)
            if only_if_absent:
                with temporary_beside(target, parents=True) as temporary:
                    fill(temporary, data)
                    _link(temporary.name, target)
                sync_folder(target.parent)
            else:
                with replacing(target, parents=True) as file:
                    fill(file, data)

    def download(self, key: str, path: Path) -> None:
        with self._faults(key), replacing(path) as file:
            fill(file, self.path(key))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file, not a folder")
        above = prefix.rpartition("/")[0]
        folder = self.path(above) if above else self.root
        if not folder.is_dir():
            return
        try:
            for path, size, fault in _walk(str(folder)):
                key = os.path.relpath(path, self.root)
                if key.startswith(prefix):
                    yield Entry(key, size, fault)
        except OSError as error:
            raise os_fault(error, error.filename or folder) from error

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for key, size, fault in self.entries(prefix):
            if fault.startswith(LINK):
                raise UserError(f"{self.root / key} is {fault}")
            if not fault:
                found[key] = size
        return dict(sorted(found.items()))

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
        with contextlib.suppress(OSError):  # not empty; object stores have no empty folders, so none are left here
            for folder in path.parents[: len(Path(key).parts) - 1]:
                folder.rmdir()

    def sweep(self, prefix: str = "") -> None:
        with self._faults(prefix):
            for folder, _, names in os.walk(self.root, topdown=False):
                inside = os.path.relpath(folder, self.root).replace(os.sep, "/") + "/"
                if not inside.removeprefix("./").startswith(prefix):
                    continue
                if any(name.startswith(TEMPORARY) for name in names):
                    sweep(Path(folder))
                if Path(folder) != self.root:
                    with contextlib.suppress(OSError):  # not empty, as those are of a writer who got further
                        os.rmdir(folder)

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        """Raise operating-system errors as MissingObject, UserError or EnvironmentFault."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingObject(f"no such file: {self.root / key}") from error
        except IsADirectoryError as error:
            raise UserError(f"{self.root / key} is a folder, not a file") from error
        except NotRegular as error:
            raise UserError(f"{self.root / key} is no file to read: {error}") from error
        except OSError as error:
            raise os_fault(error, self.root / key) from error


def _link(temporary: str, target: Path) -> None:
    """Link a complete file to its name unless that exists; a rename would overwrite."""
    try:
        os.link(temporary, target)
    except FileExistsError as error:
        raise ObjectExists(f"{target} exists already") from error


def _walk(root: str) -> Iterator[tuple[str, int, str]]:
    """Path, size and fault of every finished file below `root`; each folder once, however many links lead to it.

    Files and folders that another process removes meanwhile are left out.
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
            if not name.startswith(TEMPORARY) and (found := _size_and_fault(path)):
                yield path, *found


def _size_and_fault(path: str) -> tuple[int, str] | None:
    """The size of a file, and why it cannot be read; None if it was removed meanwhile."""
    try:
        found = _stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) or not os.path.islink(path):
            raise
        why = "round in a circle" if error.errno == errno.ELOOP else "where nothing is"
        return 0, f"{LINK} {os.readlink(path)}, {why}"
    if found is None:
        return None
    kind = stat.S_IFMT(found.st_mode)
    return found.st_size, "" if kind == stat.S_IFREG else _KINDS.get(kind, "no regular file")


def _stat(path: str) -> os.stat_result | None:
    """The status of a file; None if it was removed meanwhile."""
    try:
        return os.stat(path)
    except FileNotFoundError as error:
        _unless_gone(error)
        return None


def _unless_gone(error: OSError) -> None:
    """Raise the error, unless the file was removed meanwhile."""
    if not isinstance(error, FileNotFoundError) or os.path.lexists(error.filename):
        raise error
