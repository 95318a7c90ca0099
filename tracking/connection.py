"""Connecting to the tracking server within a bounded time.

MLflow retries an unreachable server for minutes and its database layer for another two.  A mistyped
address should fail at once, so the retries are reduced unless the environment sets them.  The
timeout of a response stays at MLflow's two minutes: a server that forwards a large file to S3
responds only once the upload is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed

from ..errors import UserError, one_line, redact
from .address import FOR_RUNS, check_address, failure, is_of_another_schema, registry_uri, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
T = TypeVar("T")
SETTINGS = {
    # A request whose response was lost may have succeeded: a retry by MLflow would create a second run or version. The
    # callers retry instead, and look first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # the training's bar is the only one
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the address with its password
}
TRIES = 3
MAX_REASON = 160  # characters
START_TIMEOUT_S = 30.0
# Creating the tables of a new database took 12 s on two busy cores.
SQLITE_START_TIMEOUT_S = 120.0


def tame_mlflow() -> None:
    """Reduce MLflow's retries, unless the environment sets them, and its log output."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)


def make_client(uri: str) -> MlflowClient:
    """Make a client of the server at `uri`. Opens a database and creates its tables, but contacts no server."""
    from mlflow import MlflowClient

    tame_mlflow()
    path = sqlite_path(uri)
    with _alone(path) if path else contextlib.nullcontext():
        if path and not (path.exists() and path.stat().st_size):
            make_database(path)
        return MlflowClient(tracking_uri=uri, registry_uri=registry_uri(uri))


def reach(uri: str, action: Callable[[MlflowClient], T], remedy: str = FOR_RUNS) -> T:
    """Return `action(client)`: the first calls to a server, with a time limit.

    Args:
        action: called again after an error, so it must check for what it is about to create.
        remedy: for error messages, which setting to correct.
    Raises:
        UserError: the server does not respond in time, or rejects the request.
    """
    for address in {uri, registry_uri(uri)}:
        check_address(address, remedy)
    outcome: list[T] = []
    failures: list[Exception] = []
    # connections break, and servers restart
    again = Retrying(
        stop=stop_after_attempt(TRIES), wait=wait_fixed(1), retry=retry_if_exception(_may_pass), reraise=True
    )

    def attempt() -> None:
        try:
            outcome.append(again(lambda: action(make_client(uri))))
        except Exception as error:  # any error of MLflow's client, HTTP or database layer
            failures.append(error)

    importlib.import_module("mlflow")  # takes seconds, which must not count as the server's
    # A thread is the only way to bound the time that MLflow's database layer takes to connect.
    thread = threading.Thread(target=attempt, name="glann-mlflow-connect", daemon=True)
    thread.start()
    limit_s = SQLITE_START_TIMEOUT_S if uri.startswith("sqlite") else START_TIMEOUT_S
    thread.join(limit_s)
    if outcome:
        return outcome[0]
    if failures and isinstance(failures[0], UserError):
        raise failures[0]
    reason = _reason(failures[0]) if failures else f"no response in {limit_s:.0f} s"
    whole = " ".join(str(error) for error in _causes(failures[0])) if failures else ""
    raise failure(uri, reason, whole, remedy) from (failures[0] if failures else None)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the named experiment, which is created if it does not exist.

    Raises:
        UserError: the experiment was deleted on the server.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run created it meanwhile
    if found is None or found.lifecycle_stage != "active":
        words = ("experiments", "restore", "--experiment-id", found.experiment_id) if found else ()
        restore = f"restore it by `{_command(client, *words)}`" if words else "restore it"
        raise UserError(f"the MLflow experiment {name!r} was deleted; {restore}, or set tracking.experiment to another")
    return found.experiment_id


def _command(client: MlflowClient, *words: str) -> str:
    """A command of MLflow at the client's server, for a shell; without the password in its address."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(redact(client.tracking_uri))} {shlex.join(['mlflow', *words])}"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time open a database file: if several find it without tables, MLflow fails in all but one.

    The lock is on the folder, so that no lock file remains.
    """
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def make_database(path: Path) -> None:
    """Create the tables in a temporary file beside it: MLflow cannot use a file left by an interrupted creation."""
    from mlflow import MlflowClient

    new = path.absolute().with_name(f".{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{new}")
    os.replace(new, path)


def _may_pass(error: BaseException) -> bool:
    """Whether a second try may succeed."""
    return not isinstance(error, UserError) and not is_of_another_schema(str(error))


def _reason(error: BaseException) -> str:
    """The message of the innermost cause, shortened: MLflow wraps urllib3's errors, which wrap the actual one."""
    text = one_line(list(_causes(error))[-1], MAX_REASON + 1)
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
