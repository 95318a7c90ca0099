"""The checks of `glann doctor` of the tracking server or database, and of TensorBoard."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from ..cluster.doctor import security
from ..cluster.doctor.check import Check
from ..config.run import Config
from ..errors import redact
from .address import address_fault, default_uri, read_only_fault, schema_fault, sqlite_path
from .tensorboard import is_installed

NAME = "mlflow server"


def tracking(config: Config) -> Iterator[Check]:
    """Check that the MLflow server answers and requires a login, or that its database can be used. Changes nothing.

    Where TensorBoard's files are asked for, also whether their package is there.
    """
    if config.tracking.tensorboard:
        there = is_installed()
        yield Check("tensorboard", there, "installed" if there else "not installed", "pip install tensorboard")
    uri = default_uri(config.tracking.uri)
    what, remedy = address_fault(uri) if config.tracking.enabled else ("", "")
    path = sqlite_path(uri)
    if not config.tracking.enabled:
        yield Check(NAME, True, "tracking is off")
    elif what:
        yield Check(NAME, False, what, f"{remedy}; or correct tracking.uri (or MLFLOW_TRACKING_URI)")
    elif uri.startswith(("http://", "https://")):
        yield from security.tracking_server(config)
    elif path is not None:
        what, remedy = _schema_fault(uri, path)
        if not what:
            what, remedy = read_only_fault(uri)
        yield Check(NAME, not what, what or redact(uri), remedy)
    else:
        yield Check(NAME, True, f"{redact(uri)} (another kind of database or service: not tested)")


def _schema_fault(uri: str, path: Path) -> tuple[str, str]:
    """What is wrong with the schema of a database file, which is only read, and the remedy."""
    found = schema_of(path)
    return schema_fault(uri, found) if found and found != newest_schema() else ("", "")


def schema_of(path: Path) -> str | None:
    """The version of the schema of MLflow's tables in a database file; None if there are none, or it is locked."""
    address = f"file:{quote(str(path.absolute()))}?mode=ro"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(address, uri=True)) as base:
        row = base.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(row[0]) if row else None
    return None


def newest_schema() -> str | None:
    """The version of the schema of this MLflow."""
    import mlflow
    from alembic.script import ScriptDirectory

    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    return migrations.get_current_head()
