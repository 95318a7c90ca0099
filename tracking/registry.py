"""The packaged model in MLflow: logged as a pyfunc, registered as a version of a name, and fetched from there.

Every call goes through an explicit client with an explicit address; MLflow's process-wide settings
are left as the user has them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import EnvironmentFault, UserError
from .connection import default_uri, reach, redact, registry_uri, sqlite_path
from .packaged import MANIFEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

NAME = "generator"  # of the logged model within its run
MANIFEST_TAG = "glann.manifest"  # of a logged model: SHA-256 of the file that names its files and their hashes
CHALLENGER, CHAMPION = "challenger", "champion"  # the aliases: the newest version, and the one that was promoted
FIRST = "register one with `glann registry register RUN` or tracking.register_as"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
INPUT_EXAMPLE = {"n": 4, "seed": 0, "truncation": 1.0}


@dataclass(frozen=True)
class PublishedModel:
    """Where a model went: `uri` loads it; `version` is its number in the registry, if registered."""

    uri: str
    name: str | None = None
    version: str | None = None


def publish(client: MlflowClient, run_id: str, folder: Path, register_as: str | None) -> PublishedModel:
    """Log the model folder as a pyfunc of the run and, where a name is given, register it.

    To be called again after a fault, wherever that was: what has been done is not done twice.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run = client.get_run(run_id)
    logged = _begun(client, run, folder)
    if logged.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory(prefix="glann-pyfunc-") as scratch:
            path = Path(scratch) / "pyfunc"
            save_pyfunc(folder, path, run_id=run_id, model_id=logged.model_id)
            client.log_model_artifacts(logged.model_id, str(path))
        client.finalize_logged_model(logged.model_id, "READY")
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in [output.model_id for output in outputs]:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    if not register_as:
        return PublishedModel(f"models:/{logged.model_id}")
    for made in client.search_model_versions(f"name = '{checked(register_as)}' and run_id = '{run_id}'"):
        if made.source == logged.artifact_location:  # the model id is not kept
            client.set_registered_model_alias(register_as, CHALLENGER, made.version)
            return PublishedModel(f"models:/{register_as}@{CHALLENGER}", register_as, str(made.version))
    return register(client, register_as, logged, run_id)


def _begun(client: MlflowClient, run: Run, folder: Path) -> LoggedModel:
    """The logged model of a run that is, or is to be, this folder: known by its manifest, made if there is none."""
    manifest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    run_id, experiment = run.info.run_id, run.info.experiment_id
    for logged in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"):
        if logged.tags.get(MANIFEST_TAG) == manifest:
            return logged
    return client.create_logged_model(experiment, name=NAME, source_run_id=run_id, tags={MANIFEST_TAG: manifest})


def register(client: MlflowClient, name: str, logged: LoggedModel, run_id: str) -> PublishedModel:
    """Make the model that a run has logged the newest version of a name, its `challenger`; tags say what it is.

    Raises:
        UserError: a name that MLflow or its addresses do not take, or a model that is not glann's.
    """
    from mlflow.exceptions import MlflowException

    from .lineage import description, manifest_of, version_tags

    checked(name)
    run = client.get_run(run_id)
    tags = version_tags(run, manifest_of(client, logged))
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name,
        logged.artifact_location,
        run_id=run_id,
        tags=tags,
        description=description(client, run_id),
        model_id=logged.model_id,
    )
    client.set_registered_model_alias(name, CHALLENGER, made.version)
    return PublishedModel(f"models:/{name}@{CHALLENGER}", name, str(made.version))


def logged_model(client: MlflowClient, run_id: str) -> LoggedModel | None:
    """The model that a run has logged, the last of several; None if it has logged none."""
    run = client.get_run(run_id)
    outputs = run.outputs.model_outputs if run.outputs else []
    found = [client.get_logged_model(output.model_id) for output in outputs]
    ours = [logged for logged in found if logged.name == NAME]
    return max(ours, key=lambda logged: logged.creation_timestamp, default=None)


def checked(name: str) -> str:
    """A name for a registered model.

    Raises:
        UserError: it cannot be one.
    """
    if not MODEL_NAME.fullmatch(name):
        raise UserError(
            f"{name[:120]!r} is no name for a model: letters, digits, dots, dashes and underscores, at most 100 of them"
        )
    return name


def save_pyfunc(folder: Path, path: Path, **identity: Any) -> None:
    """Write an MLflow model: the packaged model as an artifact, and the code that opens it, unpickled.

    The environment it names is glann and MLflow of these versions; `mlflow models serve` needs an image
    that has them (`--env-manager local`).
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    mlflow.pyfunc.save_model(
        path=str(path),
        python_model=str(Path(__file__).with_name("pyfunc.py")),
        artifacts={"model": str(folder)},
        signature=signature(),
        input_example=INPUT_EXAMPLE,
        pip_requirements=[f"glann=={__version__}", f"mlflow=={version('mlflow')}", f"torch=={_public('torch')}"],
        mlflow_model=Model(**identity),
    )
    for cache in path.rglob("__pycache__"):
        shutil.rmtree(cache)


def signature() -> Any:
    """n, seed, truncation, each of which has a default -> uint8 images [n, H, W, C]."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.long, "n"),
        ColSpec(DataType.long, "seed", required=False),
        ColSpec(DataType.double, "truncation", required=False),
    ]
    return ModelSignature(Schema(inputs), Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, -1))]))


def download(uri: str, scratch: Path) -> Path:
    """Fetch a registered model's files; nothing of what is fetched is run.

    Raises:
        UserError: no such model, version or alias.
        EnvironmentFault: the server or its store does not answer.
    """
    with opened(f"no model {uri}") as client:
        # MLflow's own resolution of models:/ asks the process-wide server, whatever it is given.
        return fetch(client.tracking_uri, locate(client, uri)[0], scratch)


def fetch(address: str, artifact_uri: str, scratch: Path) -> Path:
    """A copy of an artifact, file or folder, in `scratch`; MLflow's process-wide settings are not asked."""
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
    """A client of the registry that the environment names; its faults are told in one line, as by `told`.

    Raises:
        UserError: nothing answers, or there is no database yet: one that is only read from is not made.
    """
    address = default_uri(None)
    path = sqlite_path(address)
    if path is not None and not path.exists():
        raise UserError(f"{missing}: there is no MLflow database {path} here; {FIRST}, or set MLFLOW_TRACKING_URI")
    client, _ = reach(address, lambda client: (client, client.search_registered_models(max_results=1)))
    with told(address, missing):
        yield client


@contextmanager
def told(address: str, missing: str) -> Iterator[None]:
    """Faults of the server at `address` in one line; `missing` says what is not there where nothing is found."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        detail = redact(" ".join(str(error).split()))[:300]
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise UserError(f"{missing} at {redact(address)}: {detail}") from error
        raise EnvironmentFault(f"MLflow at {redact(address)} failed: {detail}") from error
    except OSError as error:
        raise EnvironmentFault(f"MLflow at {redact(address)} failed: {redact(str(error))[:300]}") from error


def locate(client: MlflowClient, uri: str) -> tuple[str, str | None]:
    """Where the files of `models:/name@alias`, `models:/name/3` or `models:/model-id` lie, and the run they are of."""
    reference = uri.removeprefix("models:/").strip("/")
    name, at, alias = reference.partition("@")
    if at:
        found = client.get_model_version_by_alias(name, alias)
        return client.get_model_version_download_uri(name, found.version), found.run_id
    name, slash, number = reference.partition("/")
    if not slash:
        logged = client.get_logged_model(name)
        return logged.artifact_location, logged.source_run_id
    if not number.isdecimal():
        raise UserError(f"{uri} names no version; write models:/{name}/3 or models:/{name}@{CHAMPION}")
    return client.get_model_version_download_uri(name, number), client.get_model_version(name, number).run_id


def _public(package: str) -> str:
    """The version without its build's local part (2.13.0+cpu), which no registry carries."""
    return version(package).partition("+")[0]
