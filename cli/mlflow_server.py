"""`glann mlflow`: an MLflow server that outlives its machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Endpoint, s3_at


def mlflow(
    store: Annotated[
        str,
        typer.Argument(metavar="STORE", help="keeps files and the database: s3://bucket/prefix or a folder"),
    ],
    database: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_BACKEND_STORE_URI",
            show_envvar=True,
            metavar="URI",
            help="a database of your own, e.g. postgresql://user@host/mlflow; empty: SQLite, saved to STORE",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is every interface")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="host names to answer to; empty: localhost and private addresses"),
    ] = None,
    folder: Annotated[Path, typer.Option(help="folder of SQLite's working file")] = Path("glann-mlflow"),
    restore: Annotated[int | None, typer.Option(min=1, metavar="N", help="go back to copy N of the database")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Serve MLflow: runs, models and registry outlive this machine in STORE.

    \b
    glann mlflow s3://bucket/mlflow
    glann mlflow s3://bucket/mlflow --database postgresql://glann@db.example/mlflow
    glann mlflow s3://bucket/mlflow --host 0.0.0.0 --allowed-hosts 'glann-mlflow:*,localhost:*'

    Without --database it is SQLite: saved to STORE within 5 s of a change and at the end (Ctrl-C, SIGTERM), and taken
    from there at the start, on any machine. If the machine is lost, so are the changes of at most these 5 s; a large
    database, whose copy takes long, is saved more rarely: copying takes a fifth of the time at most. One server at
    a time may serve a STORE. The last 3 copies are kept.
    """
    from ..storage.open import require_local
    from ..tracking.server import Server, serve

    require_local(folder, "--folder")
    server = Server(store, folder, database, host, port, allowed_hosts, restore=restore, s3=s3_at(endpoint))
    serve(server, lambda text: typer.echo(text))
