"""An MLflow server whose runs, models and files outlive its machine: `glann mlflow`.

Files go to a store through the server. The database is one by address, such as PostgreSQL, or SQLite, which is saved to
the same store (`copies`). One server at a time holds the lease of a store with an SQLite database.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..cluster.checkpoints.lease import RunTaken, hold, require
from ..config.sections import S3Config
from ..errors import EnvironmentFault, UserError, redact
from ..storage.files import os_fault
from ..storage.open import local_folder, open_store
from ..storage.s3_address import endpoint_of
from .address import schema_fault
from .connection import make_database
from .copies import EVERY_S, Keeper, bring
from .doctor import newest_schema, schema_of

DATABASE, ARTIFACTS = "mlflow.db", "artifacts"
DATABASE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
POLL_S = 0.5
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 20.0
# Ends the server and its worker processes with `glann mlflow`, also if that is killed: its end of the pipe closes.
WATCHDOG = """\
import os, signal, subprocess, sys, threading

def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)

signal.signal(signal.SIGTERM, lambda *_: None)
threading.Thread(target=watch, daemon=True).start()
os._exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))
"""


@dataclass(frozen=True)
class Server:
    """What to serve. store: of files, and of copies of an SQLite database. folder: of its working file. database:
    address of another database; None for SQLite. restore: number of the copy to go back to."""

    store: str
    folder: Path
    database: str | None = None
    host: str = "127.0.0.1"
    port: int = 5000
    allowed_hosts: str | None = None
    workers: int = 2
    restore: int | None = None
    s3: S3Config = field(default_factory=S3Config)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def serve(server: Server, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; the database is saved then.

    Raises:
        UserError: another server holds the store, or the saved database is damaged. EnvironmentFault: the server ended
            by itself, or could not save at its end.
    """
    store = open_store(server.store, server.s3)
    with stopping() as stop:
        if server.database:
            with running(server, server.database) as process:
                wait(server, process, stop, say, lambda: None)
            return
        with hold(store, say, "serving MLflow") as lease:
            path = server.folder / DATABASE
            say(f"database: {bring(store, path, server.restore)}")
            prepare(path)
            keeper = Keeper(store, path, lambda: require(store, lease.ticket), say)
            try:
                with contextlib.closing(keeper), running(server, f"sqlite:///{path.absolute()}") as process:
                    wait(server, process, stop, say, keeper.save_if_due)
            except RunTaken as error:
                raise UserError(f"another server has taken over {store.url}; this one has ended") from error


def prepare(path: Path) -> None:
    """Make the database if there is none, so that an interrupted first start leaves no half-made one.

    Raises:
        UserError: it is of another version of MLflow.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_fault(error, path.parent) from error
    if not path.exists():
        make_database(path)
        with contextlib.closing(sqlite3.connect(path)) as base, base:  # files of experiment 0 go through the server too
            base.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0' WHERE experiment_id = 0")
    elif (found := schema_of(path)) and found != newest_schema():
        what, remedy = schema_fault(f"sqlite:///{path.absolute()}", found)
        raise UserError(f"{what}; {remedy}")


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set inside the context."""
    stop = threading.Event()
    before = {name: signal.signal(name, lambda *_: stop.set()) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def running(server: Server, database: str) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server` in a process group of its own, all of which has ended after the context."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", WATCHDOG, *command(server)],
        env=environment(server, database, os.environ),
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process group, first by SIGTERM: MLflow's workers outlive the process that started them for a moment."""
    deadline = time.monotonic() + END_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError):  # none of the group is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline + 2:
            process.poll()
            with contextlib.suppress(ChildProcessError):  # of a container's first process they become children
                os.waitpid(-process.pid, os.WNOHANG)
            os.killpg(process.pid, signal.SIGKILL if time.monotonic() > deadline else 0)
            time.sleep(0.1)


def command(server: Server) -> list[str]:
    """The command of MLflow. A path stands for itself as the destination of files."""
    local = local_folder(server.store)
    files = f"{server.store.rstrip('/')}/{ARTIFACTS}" if local is None else str(local.absolute() / ARTIFACTS)
    words = ["server", "--host", server.host, "--port", str(server.port), "--workers", str(server.workers)]
    hosts = ["--allowed-hosts", server.allowed_hosts] if server.allowed_hosts else []
    return [sys.executable, "-P", "-m", "mlflow", *words, "--artifacts-destination", files, *hosts]


def environment(server: Server, database: str, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of MLflow; the address of the database may have a password, so it is on no command line."""
    env = {name: value for name, value in given.items() if name not in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    env |= {DATABASE_VARIABLE: database, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a dozen idle processes
    endpoint = endpoint_of(server.s3)
    return env | ({"MLFLOW_S3_ENDPOINT_URL": endpoint} if endpoint else {})


def wait(
    server: Server,
    process: subprocess.Popen[bytes],
    stop: threading.Event,
    say: Callable[[str], None],
    act: Callable[[], None],
) -> None:
    """Until the event is set, call `act` again and again.

    Raises:
        EnvironmentFault: the process has ended, or does not answer.
    """
    up, began = False, time.monotonic()
    while not stop.wait(POLL_S):
        if (status := process.poll()) is not None:
            raise EnvironmentFault(f"the MLflow server ended with status {status}; its log is above")
        if not up and (up := answers(server)):
            kept = redact(server.database) if server.database else f"saved there within {EVERY_S:g} s of a change"
            say(f"serving MLflow at {server.url}; files in {server.store}; database: {kept}")
        if not up and time.monotonic() - began > START_TIMEOUT_S:
            raise EnvironmentFault(f"the MLflow server did not answer within {START_TIMEOUT_S:g} s; its log is above")
        act()


def answers(server: Server) -> bool:
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{server.port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
