"""The address of the tracking server, and connecting to it within a bounded time.

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
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_fixed

from ..errors import UserError, one_line, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
T = TypeVar("T")
DEFAULT_URI = "sqlite:///mlflow.db"
SETTINGS = {
    # A request whose response was lost may have succeeded: a retry by MLflow would create a second run or version. The
    # callers retry instead, and look first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # the training's bar is the only one
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the address with its password
}
TRIES = 3
START_TIMEOUT_S = 30.0
# Creating the tables of a new database took 12 s on two busy cores.
SQLITE_START_TIMEOUT_S = 120.0


def default_uri(configured: str | None) -> str:
    """The tracking address: from the configuration, else the environment, else a file in the working folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def absolute_uri(uri: str) -> str:
    """Make the path of an SQLite address absolute, so that it is valid in every working folder."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or uri.startswith(prefix + "/"):
        return uri
    return prefix + str(Path(uri.removeprefix(prefix)).absolute())


def registry_uri(tracking_uri: str) -> str:
    """The address of the registry: from the environment, else the tracking server."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri


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
            _make_database(path)
        return MlflowClient(tracking_uri=uri, registry_uri=registry_uri(uri))


def reach(uri: str, action: Callable[[MlflowClient], T]) -> T:
    """Return `action(client)`: the first calls to a server, with a time limit.

    Args:
        action: called again after an error, so it must check for what it is about to create.
    Raises:
        UserError: the server does not respond in time, or rejects the request.
    """
    _check_sqlite(uri)
    outcome: list[T] = []
    failure: list[Exception] = []
    # connections break, and servers restart
    again = Retrying(
        stop=stop_after_attempt(TRIES), wait=wait_fixed(1), retry=retry_if_not_exception_type(UserError), reraise=True
    )

    def attempt() -> None:
        try:
            outcome.append(again(lambda: action(make_client(uri))))
        except Exception as error:  # any error of MLflow's client, HTTP or database layer
            failure.append(error)

    importlib.import_module("mlflow")  # takes seconds, which must not count as the server's
    # A thread is the only way to bound the time that MLflow's database layer takes to connect.
    thread = threading.Thread(target=attempt, name="glann-mlflow-connect", daemon=True)
    thread.start()
    limit_s = SQLITE_START_TIMEOUT_S if uri.startswith("sqlite") else START_TIMEOUT_S
    thread.join(limit_s)
    if outcome:
        return outcome[0]
    if failure and isinstance(failure[0], UserError):
        raise failure[0]
    reason = _reason(failure[0]) if failure else f"no response in {limit_s:.0f} s"
    raise UserError(
        f"the MLflow tracking server {redact(uri)} cannot be used: {reason}; "
        "start it, correct tracking.uri (or MLFLOW_TRACKING_URI), or set tracking.enabled=false"
    ) from (failure[0] if failure else None)


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
        raise UserError(f"the MLflow experiment {name!r} was deleted; restore it or set tracking.experiment to another")
    return found.experiment_id


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite address; None for other addresses."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


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


def _make_database(path: Path) -> None:
    """Create the tables in a temporary file beside it: MLflow cannot use a file left by an interrupted creation."""
    from mlflow import MlflowClient

    new = path.absolute().with_name(f".{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{new}")
    os.replace(new, path)


def _check_sqlite(uri: str) -> None:
    """Raise UserError at once for an unusable database file; MLflow would retry for two minutes."""
    path = sqlite_path(uri)
    if path is None:
        return
    remedy = "correct tracking.uri (or MLFLOW_TRACKING_URI), or set tracking.enabled=false"
    if path.name == ":memory:":
        raise UserError(f"{uri} forgets everything when the run ends; {remedy}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"the folder of the MLflow database {path} does not exist; make it, {remedy}")
    if not path.exists():
        if not os.access(path.absolute().parent, os.W_OK):
            raise UserError(f"the MLflow database {path} cannot be made in its folder; {remedy}")
        return
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"the MLflow database {path} cannot be read: {error.strerror}; {remedy}") from error
    if head and head != b"SQLite format 3\x00":
        raise UserError(f"{path} is not an SQLite database; {remedy}")


def _reason(error: BaseException) -> str:
    """The message of the innermost cause, shortened: MLflow wraps urllib3's errors, which wrap the actual one."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = one_line(error, 161)
    return text if len(text) <= 160 else text[:157] + "..."
