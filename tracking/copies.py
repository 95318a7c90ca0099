"""Copies of MLflow's SQLite database in a store: whole, checked, numbered, and never written by two servers.

    database/000042.sqlite      a copy, made by SQLite's backup: one moment of the database, also while it is written
    database/copies.json        the copies that are kept, with size, SHA-256 and time; written last

A copy that is not in copies.json does not count: its writer was killed. The working file lies on the server's own disk,
with the number of the copy that it came from; it is used again unless the store has a newer copy.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path
from time import monotonic
from urllib.parse import quote

from pydantic import Field, ValidationError

from ..config.section import Section
from ..errors import EnvironmentFault, UserError, one_line
from ..storage.base import MissingObject, Store
from ..storage.files import os_fault, read_document, replacing, write_whole
from ..storage.journal import strict_json

INDEX, STATE = "database/copies.json", "copy.json"
KEEP = 3
EVERY_S = 5.0  # between copies of a database that changes: at most so much is lost with the machine
LOCK_TIMEOUT_S = 30.0  # for a moment in which MLflow does not write
SHARE = 5  # a copy that takes long is made more rarely, so that copying takes a fifth of the time at most
ASIDE = ("-journal", "-wal", "-shm")  # suffixes of SQLite's own files beside a database
_KEY = re.compile(r"database/(\d{6,12})\.sqlite")


class Copy(Section):
    """One copy. saved: UTC, for people."""

    number: int = Field(ge=1)
    size: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    saved: str = Field(max_length=40)

    @property
    def key(self) -> str:
        return f"database/{self.number:06d}.sqlite"


class Index(Section):
    """The content of copies.json, the oldest first."""

    copies: tuple[Copy, ...]


class State(Section):
    """The content of copy.json beside the working file: the copy in `store` that it came from, or was saved as."""

    store: str
    number: int = Field(ge=0)


def read_copies(store: Store) -> tuple[Copy, ...]:
    """The copies in a store, the oldest first; none in a new one.

    Raises:
        UserError: the list is damaged, or is missing beside copies.
    """
    where, remedy = f"{store.url}/{INDEX}", "put an earlier version of it back (bucket versioning has one)"
    try:
        return Index.model_validate(strict_json(store.read(INDEX))).copies
    except MissingObject:
        if found := [key for key in store.list("database/") if (match := _KEY.fullmatch(key)) and int(match[1]) > 1]:
            raise UserError(f"{where} is missing beside {found[-1]}; {remedy}") from None
        return ()
    except (ValidationError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged; {remedy}") from error


def bring(store: Store, path: Path, number: int | None = None) -> str:
    """Have the newest database at `path`: the working file, or a copy; returns where it came from, in words.

    Args:
        number: of the copy to take in place of the newest.
    Raises:
        UserError: the copy is damaged, or there is none of that number; nothing is changed then.
    """
    copies, state = read_copies(store), _state(path)
    newest = copies[-1].number if copies else 0
    own = path.exists() and (state.number if state and state.store == store.url else 0) >= newest
    if number is None and own:
        return f"the working file {path}"
    if not copies:
        return "a new database"
    chosen = copies[-1] if number is None else next((copy for copy in copies if copy.number == number), None)
    if chosen is None:
        raise UserError(f"{store.url} has no copy {number}; there are {', '.join(str(c.number) for c in copies)}")
    _take(store, chosen, path, copies)
    _note(path, State(store=store.url, number=newest))
    return f"copy {chosen.number} of {chosen.saved}"


def _take(store: Store, copy: Copy, path: Path, copies: tuple[Copy, ...]) -> None:
    try:
        with replacing(path, parents=True) as file:
            try:
                store.download(copy.key, Path(file.name))
            except MissingObject:
                raise _damaged(store, copy, copies, "it is missing") from None
            with open(file.name, "rb") as taken:
                if file_digest(taken, "sha256").hexdigest() != copy.sha256:
                    raise _damaged(store, copy, copies, "its SHA-256 is another one")
            if fault := fault_of(Path(file.name)):
                raise _damaged(store, copy, copies, fault)
            if path.exists():  # it may hold what was never copied
                os.replace(path, path.with_name(f"{path.name}.before-{copy.number}"))
            for aside in ASIDE:
                path.with_name(path.name + aside).unlink(missing_ok=True)
    except OSError as error:
        raise os_fault(error, path) from error


def _damaged(store: Store, copy: Copy, copies: tuple[Copy, ...], why: str) -> UserError:
    others = ", ".join(f"--restore {other.number} ({other.saved})" for other in reversed(copies) if other != copy)
    hint = f"take an earlier one: {others}" if others else "there is no other one"
    return UserError(f"the MLflow database {store.url}/{copy.key} is damaged: {why}; {hint}")


def fault_of(path: Path) -> str:
    """What SQLite finds wrong with a database file; empty if nothing."""
    try:
        with contextlib.closing(_opened(path)) as base:
            found = base.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        return one_line(error)
    return "" if found == "ok" else str(found)


def _opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=LOCK_TIMEOUT_S)


def _state(path: Path) -> State | None:
    try:
        return State.model_validate(strict_json(read_document(path.with_name(STATE))))
    except (OSError, ValueError, RecursionError):  # not there, or not written to its end
        return None


def _note(path: Path, state: State) -> None:
    write_whole(path.with_name(STATE), state.model_dump_json() + "\n")


class Keeper:
    """Saves a database whenever it has changed. require: raises where another server has taken over."""

    def __init__(self, store: Store, path: Path, require: Callable[[], None], say: Callable[[str], None]) -> None:
        self.store, self.path, self.require, self.say = store, path, require, say
        self.copies = read_copies(store)
        self.base = _opened(path)
        self.saved_version = -1
        self.due = self.failing_since = 0.0

    def save_if_due(self) -> None:
        """Save the database if it has changed, and the last copy is old enough. A failing store is waited for.

        Raises:
            RunTaken: another server has taken over.
        """
        began = monotonic()
        try:
            if began < self.due or self.version() == self.saved_version:
                return
            self.save()
        except (EnvironmentFault, sqlite3.OperationalError) as error:  # the latter: locked for too long
            self.due = monotonic() + EVERY_S
            if not self.failing_since:
                self.failing_since = began
                self.say(f"the MLflow database is not saved, and is tried again: {error}")
            return
        self.due = monotonic() + max(EVERY_S, SHARE * (monotonic() - began))
        if self.failing_since:
            self.say(f"the MLflow database is saved again, after {monotonic() - self.failing_since:.0f} s")
            self.failing_since = 0.0

    def version(self) -> int:
        """A number that changes whenever another process has written to the database."""
        return int(self.base.execute("PRAGMA data_version").fetchone()[0])

    def save(self) -> None:
        """Save the database as the next copy.

        Raises:
            UserError: the database is damaged. RunTaken, EnvironmentFault: the store is not ours, or fails.
        """
        version, number = self.version(), self.copies[-1].number + 1 if self.copies else 1
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=self.path.parent) as scratch:
            file = Path(scratch) / "copy.sqlite"
            with contextlib.closing(sqlite3.connect(file)) as target:
                self.base.backup(target)
            if fault := fault_of(file):
                raise UserError(f"the MLflow database {self.path} is damaged and not saved: {fault}")
            with file.open("rb") as written:
                digest = file_digest(written, "sha256").hexdigest()
            saved = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            copy = Copy(number=number, size=file.stat().st_size, sha256=digest, saved=saved)
            self.require()
            self.store.write(copy.key, file)
        kept = (*self.copies[-KEEP + 1 :], copy)
        _note(self.path, State(store=self.store.url, number=number))  # before: the working file is never older
        self.require()
        self.store.write(INDEX, Index(copies=kept).model_dump_json(indent=2).encode())
        for old in self.copies[: -KEEP + 1]:
            self.store.delete(old.key)
        self.copies, self.saved_version = kept, version

    def close(self) -> None:
        """Save what has changed since the last copy.

        Raises:
            EnvironmentFault: the store fails; the working file has all of it.
        """
        try:
            if self.version() != self.saved_version:
                self.save()
        except EnvironmentFault as error:
            raise EnvironmentFault(
                f"the MLflow database could not be saved at the end ({error}); {self.path} has all of it: serve it "
                "again on this machine"
            ) from error
        finally:
            self.base.close()
