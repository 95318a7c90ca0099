"""Exclusive lease of a run in its checkpoint store, so that two commands never train the same run.

The lease is a numbered object, `lease-000007.json`, created on condition that it is absent. The highest number is in
force; its holder renews it by incrementing its count. A command that sees that count unchanged for `PATIENCE_S` by its
own clock creates the next number; if several do, one of them succeeds. So clocks of different machines are never
compared. A holder that finds a higher number has lost the run and must not commit any more. The lease of a process of
this machine that no longer exists is taken over at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ...errors import EnvironmentFault, UserError
from ...storage.author import user_at_host
from ...storage.base import MissingObject, ObjectExists, Store
from .layout import parse

log = logging.getLogger(__name__)

RENEW_S = 3.0
PATIENCE_S = 15.0  # until another machine may take over the run of a killed command
_POLL_S = 0.5
_LEASE = re.compile(r"^lease-(\d{6,12})\.json$")


class RunTaken(UserError):
    """Another command holds the lease of the run."""


class Lease(BaseModel):
    """Contents of the lease object. Decisions depend on `count`, `owner`, `process` and `released` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: int = Field(ge=1)
    owner: str = Field(pattern=r"^[0-9a-f]{1,64}$")
    holder: str = Field(max_length=300, description="user, machine and process, for people")
    since: str = Field(max_length=40, description="UTC, by the holder's clock, for people")
    process: str = Field(max_length=300, description="identity of the process, to detect its end on the same machine")
    count: int = Field(ge=0)
    released: bool = False


@dataclass(frozen=True)
class Ticket:
    """Identity of a lease, with which workers check that it is still in force (`require`)."""

    number: int
    owner: str


def require(store: Store, ticket: Ticket) -> None:
    """Raise RunTaken if the lease of `ticket` is not in force any more; call it right before a commit."""
    newest = _newest(store)
    if newest is None or (newest.number, newest.owner) != (ticket.number, ticket.owner):
        by = f"was taken over by {newest.holder}" if newest else "has lost its lease: its checkpoint folder was removed"
        raise RunTaken(f"the run at {store.url} {by}; this command stops, and has written nothing since")


class HeldLease:
    """A lease in force, renewed by a thread until it is released; created by `hold`."""

    def __init__(self, store: Store, lease: Lease):
        self._store, self._lease = store, lease
        self.ticket = Ticket(lease.number, lease.owner)
        self._lost: RunTaken | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RunTaken if the last renewal found another holder. Makes no request."""
        if self._lost:
            raise self._lost

    def release(self) -> None:
        """Release the lease, so that the next command can take it at once."""
        self._end.set()
        self._thread.join(RENEW_S)
        with contextlib.suppress(RunTaken, EnvironmentFault):
            require(self._store, self.ticket)
            _write(self._store, self._lease.model_copy(update={"released": True}))

    def _renew(self) -> None:
        while not self._end.wait(RENEW_S):
            try:
                require(self._store, self.ticket)
                self._lease = self._lease.model_copy(update={"count": self._lease.count + 1})
                _write(self._store, self._lease)
            except RunTaken as error:
                self._lost = error
                return
            except Exception as error:  # the lease stays in force until another command takes it
                log.warning("the lease of %s could not be renewed: %s", self._store.url, error)


@contextlib.contextmanager
def hold(store: Store, say: Callable[[str], None], doing: str = "training the run") -> Iterator[HeldLease]:
    """Hold the lease of a run inside the context, after at most `PATIENCE_S` of waiting for an unresponsive holder.

    Args:
        say: receives one-line messages for the user. doing: what the holder does, in them.
    Raises:
        RunTaken: another command trains the run; the message names its holder, since when, and the remedy.
    """
    if not enforces_conditions(store):
        say(
            f"{store.url}: this server does not enforce If-None-Match, so a second command on the same run that starts "
            "at the same moment might not be refused"
        )
    held = HeldLease(store, _take(store, say, doing))
    try:
        yield held
    finally:
        held.release()


def enforces_conditions(store: Store) -> bool:
    """Whether the store refuses a second conditional write to the same key. Removes its test object."""
    key = f"lease-probe-{secrets.token_hex(8)}"
    try:
        for body in (b"1", b"2"):
            store.write(key, body, only_if_absent=True)
    except ObjectExists:
        return store.read(key) == b"1"
    finally:
        store.delete(key)
    return False


def _take(store: Store, say: Callable[[str], None], doing: str) -> Lease:
    """Create the next lease once the one in force is released or no longer renewed."""
    waited_for: Lease | None = None
    since = time.monotonic()
    while True:
        newest = _newest(store)
        if newest is None or newest.released or _is_gone(newest.process):
            if newest and not newest.released:
                say(f"the last command here, {newest.holder}, is gone; taking over")
        elif waited_for is None or newest.owner != waited_for.owner:
            if waited_for is None:
                waited_for, since = newest, time.monotonic()
                say(f"checking whether {newest.holder} is still {doing} (at most {PATIENCE_S:g} s)")
                continue
            raise _taken(store, newest, doing)
        elif newest.count != waited_for.count:
            raise _taken(store, newest, doing)
        elif time.monotonic() - since < PATIENCE_S:
            time.sleep(_POLL_S)
            continue
        else:
            say(f"{newest.holder} has not renewed its lease for {PATIENCE_S:g} s; taking over")
        mine = _new(newest.number + 1 if newest else 1)
        if _create(store, mine):
            for number in _numbers(store):
                if number < mine.number:
                    store.delete(_key(number))
            return mine


def _taken(store: Store, lease: Lease, doing: str) -> RunTaken:
    other = ", or use another name=..." if "run" in doing else ""
    return RunTaken(
        f"{lease.holder} has been {doing} at {store.url} since {lease.since} and is still active; wait for it, or stop "
        f"it{other}; this command can take over once that one ends, or {PATIENCE_S:g} s "
        "after it last renewed its lease"
    )


def _new(number: int) -> Lease:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = f"{user_at_host()} (process {os.getpid()})"
    return Lease(
        number=number, owner=secrets.token_hex(16), holder=holder, since=now, process=_process(os.getpid()), count=0
    )


def _create(store: Store, lease: Lease) -> bool:
    """Create the object; False if another command did so first."""
    with contextlib.suppress(ObjectExists):  # possibly by our own earlier request whose answer was lost
        store.write(_key(lease.number), lease.model_dump_json().encode(), only_if_absent=True)
    newest = _newest(store)
    return newest is not None and newest.owner == lease.owner


def _write(store: Store, lease: Lease) -> None:
    store.write(_key(lease.number), lease.model_dump_json().encode())


def _newest(store: Store) -> Lease | None:
    """The lease in force."""
    while numbers := _numbers(store):
        key = _key(numbers[-1])
        try:
            return parse(Lease, store.read(key), f"{store.url}/{key}")
        except MissingObject:  # removed by a newer holder between the two requests
            continue
    return None


def _numbers(store: Store) -> list[int]:
    return sorted(int(match[1]) for key in store.list("lease-") if (match := _LEASE.match(key)))


def _key(number: int) -> str:
    return f"lease-{number:06d}.json"


def _process(pid: int) -> str:
    """Boot id of this machine, process namespace, and id and start of a process; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {_started(pid)}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start of a process in ticks since boot, since process ids are reused; empty for one that has ended."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def _is_gone(process: str) -> bool:
    """Whether the process ran on this boot of this machine and has ended; False if that is unknown."""
    parts, here = process.split(), _process(os.getpid()).split()
    if len(parts) != 4 or len(here) != 4 or parts[:2] != here[:2] or not parts[2].isdecimal():
        return False
    try:
        return _started(int(parts[2])) != parts[3]
    except FileNotFoundError:
        return True
    except OSError:
        return False
