"""Addresses of tracking servers and databases: what cannot work is refused at once, with the remedy."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import UserError, redact
from ..storage.proxy import proxy_hint

DEFAULT_URI = "sqlite:///mlflow.db"
FOR_RUNS = "correct tracking.uri (or MLFLOW_TRACKING_URI), or set tracking.enabled=false"
FOR_REGISTRY = "correct MLFLOW_TRACKING_URI"
DATABASES = ("postgresql", "mysql", "mssql", "sqlite")
FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"  # MLflow's own switch
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)(.*)", re.DOTALL)
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d+(/.*)?")
_SCHEMA = re.compile(r"out-of-date database schema \(found version (\w+)|Can't locate revision identified by '(\w+)'")


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


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite address; None for other addresses."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def address_fault(uri: str) -> tuple[str, str]:
    """What is wrong with a tracking address, and the remedy; two empty texts if nothing is. Makes no request.

    Addresses of MLflow's plug-ins, which only MLflow knows, are not judged.
    """
    shown = redact(uri[:300])
    if not uri.strip() or not uri.isprintable():
        return f"{shown!r} is not the address of an MLflow server", "write http://HOST:PORT or sqlite:///FILE"
    if uri in ("databricks", "databricks-uc", "uc"):
        return "", ""
    if _HOST_AND_PORT.fullmatch(uri):
        return f"{shown} lacks http:// or https://", f"write http://{shown}"
    found = _SCHEME.fullmatch(uri)
    scheme, slashes, rest = (found[1].lower(), found[2], found[3]) if found else ("", "", uri)
    if scheme in ("http", "https"):
        return _http_fault(uri, shown, scheme, rest)
    if scheme.partition("+")[0] == "sqlite":
        if len(slashes) < 3:
            return f"{shown} is not the address of a file", f"did you mean sqlite:///{redact(rest)}?"
        return _readable(uri, _sqlite_fault)
    if scheme.partition("+")[0] in DATABASES and slashes != "//":
        return f"{shown} is not a complete address", f"did you mean {scheme}://{rest.rpartition('@')[2]}?"
    if scheme in ("", "file") and not os.environ.get(FILE_STORE):
        return _readable(uri, _file_store)
    return "", ""


def check_address(uri: str, remedy: str) -> None:
    """Raise UserError at once for an address that cannot work; MLflow would retry for minutes.

    Args:
        remedy: which setting to correct, FOR_RUNS or FOR_REGISTRY.
    """
    what, do = address_fault(uri)
    if not what and remedy == FOR_RUNS:
        what, do = read_only_fault(uri)
    if what:
        raise UserError(f"{what}; {do}; or {remedy}")


def _http_fault(uri: str, shown: str, scheme: str, rest: str) -> tuple[str, str]:
    try:
        split = urlsplit(uri)
        complete = bool(split.hostname) and split.port != 0
    except ValueError:  # half a bracket, or a port that is no number
        complete = False
    if complete and " " not in uri:
        return "", ""
    meant = f"did you mean {scheme}://{rest}?" if rest and "@" not in rest and "://" not in uri else ""
    return f"{shown} is not a complete address", meant or f"write {scheme}://HOST:PORT"


def _readable(uri: str, check: Callable[[str], tuple[str, str]]) -> tuple[str, str]:
    """The result of a check of a file, or the error of the operating system in its place."""
    try:
        return check(uri)
    except OSError as error:  # a name that is too long, or a folder that may not be looked into
        return f"{redact(uri[:300])} cannot be used: {error.strerror}", "name another file"


def _file_store(uri: str) -> tuple[str, str]:
    """MLflow's former storage in a folder, which it refuses since 3.x unless MLFLOW_ALLOW_FILE_STORE is set."""
    folder = Path(uri.removeprefix("file:").removeprefix("//") if uri.lower().startswith("file:") else uri)
    what = f"{redact(uri)} is a folder, which MLflow {version('mlflow')} does not use for runs any more"
    if not folder.is_dir():
        return what, f"use {DEFAULT_URI}, or http://HOST:PORT for a server"
    target = DEFAULT_URI if not Path("mlflow.db").exists() else f"sqlite:///{folder.name}.db"
    move = shlex.join(["mlflow", "migrate-filestore", "--source", str(folder), "--target", target])
    return what, f"copy its runs into a database, `{move}`, and use {target}"


def _sqlite_fault(uri: str) -> tuple[str, str]:
    path = sqlite_path(uri)
    if path is None:  # with a driver: SQLAlchemy knows whether there is one
        return "", ""
    folder = path.absolute().parent
    if path.name in ("", ":memory:"):
        return f"{uri} forgets everything when the run ends", "name a file"
    if not folder.is_dir():
        return f"the folder of the MLflow database {path} does not exist", f"mkdir -p {shlex.quote(str(folder))}"
    if not path.exists():
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"the MLflow database {path} cannot be made: {folder} is read-only", "name a file elsewhere"
        return "", ""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            head = file.read(16)
    except OSError as error:
        return f"the MLflow database {path} cannot be read: {error.strerror}", "name another file"
    if head and head != b"SQLite format 3\x00":
        return f"{path} is not an SQLite database", "name another file"
    return "", ""


def read_only_fault(uri: str) -> tuple[str, str]:
    """What prevents writing to a database file, and the remedy. Reading models from it is still possible."""
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return "", ""
    for place, mode in ((path, os.W_OK), (path.absolute().parent, os.W_OK | os.X_OK)):  # the journal lies beside it
        if not os.access(place, mode):
            return f"{place} is read-only, so the MLflow database {path} cannot be written", shlex.join(
                ["chmod", "u+w", str(place)]
            )
    return "", ""


def failure(uri: str, reason: str, whole: str, remedy: str) -> UserError:
    """The error for an address at which MLflow failed.

    Args:
        reason: the innermost cause, shortened. whole: the messages of all causes.
        remedy: which setting to correct, FOR_RUNS or FOR_REGISTRY.
    """
    shown = redact(uri)
    if found := _SCHEMA.search(whole):
        what, do = schema_fault(uri, found[1] or found[2])
        return UserError(f"{what}; {do}; or {remedy}")
    if uri.startswith(("http://", "https://")):
        hint = proxy_hint(uri, reads_all_proxy=True)
        return UserError(f"the MLflow tracking server {shown} cannot be used: {reason}; start it, {remedy}{hint}")
    if uri.startswith("sqlite"):
        return UserError(f"the MLflow database {shown} cannot be used: {reason}; {remedy}")
    return UserError(f"MLflow cannot use {shown}: {reason}; check that it is running and its address, {remedy}")


def is_of_another_schema(message: str) -> bool:
    """Whether MLflow's message says that a database has the tables of another version."""
    return _SCHEMA.search(message) is not None


def schema_fault(uri: str, found: str) -> tuple[str, str]:
    """What is wrong with a database of the schema `found`, not that of the MLflow here, and the remedy."""
    here, shown = f"the {version('mlflow')} here", redact(uri)
    if _is_known(found):
        do = f"copy it, then upgrade it: `{shlex.join(['mlflow', 'db', 'upgrade', shown])}`"
        return f"the MLflow database {shown} was made by an older MLflow than {here}", do
    return f"the MLflow database {shown} was made by a newer MLflow than {here} (schema {found})", "upgrade MLflow here"


def _is_known(revision: str) -> bool:
    """Whether the MLflow here has a migration with that name, so that it can upgrade from there."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    try:
        migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
        return migrations.get_revision(revision) is not None
    except CommandError:
        return False
