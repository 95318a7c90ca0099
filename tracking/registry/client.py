"""Access to the model registry: an explicit client, one-line errors, and the files of a model."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import EnvironmentFault, UserError, one_line, redact
from ...storage.proxy import proxy_hint
from ..address import FOR_REGISTRY, default_uri, registry_uri, sqlite_path
from ..connection import reach

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHALLENGER, CHAMPION = "challenger", "champion"  # aliases: the newest version, and the promoted one

NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")  # MLflow's codes
FIRST = "register one with `glann registry register RUN` or tracking.register_as"


def download(uri: str, scratch: Path) -> Path:
    """Download the files of a registered model; no downloaded code is run.

    Raises:
        UserError: no such model, version or alias.
        EnvironmentFault: the server or its store does not respond.
    """
    with opened(f"no model {uri}") as client:
        # MLflow's own resolution of models:/ always uses the process-wide server.
        return fetch(client.tracking_uri, locate(client, uri)[0], scratch)


def fetch(address: str, artifact_uri: str, scratch: Path) -> Path:
    """Copy an artifact, file or folder, to `scratch`, independent of MLflow's process-wide settings."""
    from mlflow.artifacts import download_artifacts

    return Path(
        download_artifacts(
            artifact_uri=artifact_uri,
            dst_path=str(scratch),
            tracking_uri=address,
            registry_uri=registry_uri(address),
        )
    )


@contextmanager
def opened(missing: str) -> Iterator[MlflowClient]:
    """A client of the environment's registry; errors are converted by `one_line_errors`.

    Raises:
        UserError: no response, or no database: reading does not create one.
    """
    address = default_uri(None)
    path = sqlite_path(address)
    if path is not None and not path.exists():
        raise UserError(f"{missing}: there is no MLflow database {path} here; {FIRST}, or set MLFLOW_TRACKING_URI")
    client, _ = reach(address, lambda client: (client, client.search_registered_models(max_results=1)), FOR_REGISTRY)
    with one_line_errors(address, missing):
        yield client


@contextmanager
def one_line_errors(address: str, missing: str) -> Iterator[None]:
    """Raise errors of the server at `address` as UserError or EnvironmentFault, in one line.

    `missing`: beginning of the message for something that the server does not find.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        detail = one_line(error, 300)
        if error.error_code in NOT_FOUND:
            raise UserError(f"{missing} at {redact(address)}: {detail}") from error
        hint = proxy_hint(address, reads_all_proxy=True)
        raise EnvironmentFault(f"MLflow at {redact(address)} failed: {detail}{hint}") from error
    except OSError as error:
        hint = proxy_hint(address, reads_all_proxy=True)
        raise EnvironmentFault(f"MLflow at {redact(address)} failed: {one_line(error, 300)}{hint}") from error


def locate(client: MlflowClient, uri: str) -> tuple[str, str | None]:
    """The address of the files of `models:/name@alias`, `models:/name/3` or `models:/model-id`, and their run id."""
    reference = uri.removeprefix("models:/").strip("/")
    name, at, alias = reference.partition("@")
    if at:
        found = _version_of_alias(client, name, alias)
        return client.get_model_version_download_uri(name, found.version), found.run_id
    name, slash, number = reference.partition("/")
    if not slash:
        logged = client.get_logged_model(name)
        return logged.artifact_location, logged.source_run_id
    if not number.isdecimal():
        raise UserError(f"{uri} names no version; write models:/{name}/3 or models:/{name}@{CHAMPION}")
    _require_version(client, name, number)
    return client.get_model_version_download_uri(name, number), client.get_model_version(name, number).run_id


def _version_of_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        aliases = sorted(_registered(client, name).aliases)
        there = f"its aliases: {', '.join(aliases)}" if aliases else "it has none"
        promote = f"; `glann registry promote {shlex.quote(name)}` makes a champion" if alias == CHAMPION else ""
        raise UserError(
            f"{name} has no alias {alias} at {redact(client.tracking_uri)} ({there}){promote}; "
            f"`glann registry show {shlex.quote(name)}` lists its versions"
        ) from error


def _require_version(client: MlflowClient, name: str, number: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        _registered(client, name)
        where = f"{redact(client.tracking_uri)}; `glann registry show {shlex.quote(name)}` lists them"
        raise UserError(f"{name} has no version {number} at {where}") from error


def _registered(client: MlflowClient, name: str) -> RegisteredModel:
    """The registered model of that name. Raises UserError with the names that there are."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        names = ", ".join(sorted(model.name for model in client.search_registered_models(max_results=10)))
        there = f"there is {names}" if names else FIRST
        raise UserError(f"no model {name} at {redact(client.tracking_uri)}; {there}") from error
