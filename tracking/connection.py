"""The address of the tracking server, and reaching it within a bounded time.

MLflow retries a dead server for minutes and its database layer for another two.  A user who mistyped
an address should hear of it at once, so MLflow's patience is shortened, unless the environment
already says how long it should be.  How long an answer may take is left as it is (two minutes): a
server that passes a large file on to S3 answers when it lies there.
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
    # A request whose answer was lost has been heard: asked again, MLflow makes a second run or version. We look first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # there is one bar, and it is the training's
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the address with its password
}
TRIES = 3
START_TIMEOUT_S = 30.0
# Making the tables of a new database took 12 s on two busy cores.
SQLITE_START_TIMEOUT_S = 120.0


def default_uri(configured: str | None) -> str:
    """The tracking address in force: the configuration, else the environment, else a file in the working folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def absolute_uri(uri: str) -> str:
    """A tracking address that means the same in every working folder: sqlite's default is a file in ours."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or uri.startswith(prefix + "/"):
        return uri
    return prefix + str(Path(uri.removeprefix(prefix)).absolute())


def registry_uri(tracking_uri: str) -> str:
    """The registry's address: the environment's, else the tracking server."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri


def tame_mlflow() -> None:
    """Have MLflow give up on a dead server in seconds, unless the environment says otherwise, and chat less."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)


def make_client(uri: str) -> MlflowClient:
    """A client of the server at `uri`; only a database has been opened by then, and has its tables."""
    from mlflow import MlflowClient

    tame_mlflow()
    path = sqlite_path(uri)
    with _alone(path) if path else contextlib.nullcontext():
        if path and not (path.exists() and path.stat().st_size):
            _make_database(path)
        return MlflowClient(tracking_uri=uri, registry_uri=registry_uri(uri))


def reach(uri: str, action: Callable[[MlflowClient], T]) -> T:
    """The result of `action(client)`: the first calls to a server, which say whether it is there.

    Args:
        action: is called again after a fault, so it must look for what it is about to make.
    Raises:
        UserError: the server does not answer in time, or refuses.
    """
    _check_sqlite(uri)
    outcome: list[T] = []
    failure: list[Exception] = []
    # a connection may break, and a server may be restarted
    again = Retrying(
        stop=stop_after_attempt(TRIES), wait=wait_fixed(1), retry=retry_if_not_exception_type(UserError), reraise=True
    )

    def attempt() -> None:
        try:
            outcome.append(again(lambda: action(make_client(uri))))
        except Exception as error:  # whatever MLflow's client, its HTTP or its database layer raises
            failure.append(error)

    importlib.import_module("mlflow")  # takes seconds, and they are not the server's
    # A thread, since there is no other way to bound what MLflow's database layer does on connecting.
    thread = threading.Thread(target=attempt, name="glann-mlflow-connect", daemon=True)
    thread.start()
    limit_s = SQLITE_START_TIMEOUT_S if uri.startswith("sqlite") else START_TIMEOUT_S
    thread.join(limit_s)
    if outcome:
        return outcome[0]
    if failure and isinstance(failure[0], UserError):
        raise failure[0]
    reason = _reason(failure[0]) if failure else f"no answer in {limit_s:.0f} s"
    raise UserError(
        f"the MLflow tracking server {redact(uri)} cannot be used: {reason}; "
        "start it, correct tracking.uri (or MLFLOW_TRACKING_URI), or set tracking.enabled=false"
    ) from (failure[0] if failure else None)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the experiment of that name, made if need be.

    Raises:
        UserError: it was deleted on the server.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run made it in between
    if found is None or found.lifecycle_stage != "active":
        raise UserError(f"the MLflow experiment {name!r} was deleted; restore it or set tracking.experiment to another")
    return found.experiment_id


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite database; None for any other address."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time opens a database file: of several that found it without tables, MLflow fails all but one.

    The lock is on the folder, where it leaves no file.
    """
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _make_database(path: Path) -> None:
    """Have MLflow make its tables in a file beside it: one over which it was killed is of no use to it any more."""
    from mlflow import MlflowClient

    new = path.absolute().with_name(f".{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{new}")
    os.replace(new, path)


def _check_sqlite(uri: str) -> None:
    """What is wrong with a database file, said at once; MLflow would try for two minutes."""
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
    """The innermost cause in a few words: MLflow wraps urllib3, which wraps the one that says something."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = one_line(error, 161)
    return text if len(text) <= 160 else text[:157] + "..."
