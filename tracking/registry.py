"""The packaged model in MLflow: logged as a pyfunc, put in the model registry and fetched from there.

Every call goes through an explicit client with an explicit address; MLflow's process-wide settings
are left as the user has them.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import EnvironmentFault, UserError
from .connection import default_uri, make_client, redact, registry_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "generator"  # of the logged model within its run
ALIAS = "challenger"
INPUT_EXAMPLE = {"n": 4, "seed": 0, "truncation": 1.0}


@dataclass(frozen=True)
class PublishedModel:
    """Where a model went: `uri` loads it; `version` is its number in the registry, if registered."""

    uri: str
    name: str | None = None
    version: str | None = None


def publish(client: MlflowClient, run_id: str, folder: Path, register_as: str | None) -> PublishedModel:
    """Log the model folder as a pyfunc of the run and, where a name is given, register it as `challenger`."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    logged = client.create_logged_model(run.info.experiment_id, name=NAME, source_run_id=run_id)
    with tempfile.TemporaryDirectory(prefix="glann-pyfunc-") as scratch:
        path = Path(scratch) / "pyfunc"
        save_pyfunc(folder, path, run_id=run_id, model_id=logged.model_id)
        client.log_model_artifacts(logged.model_id, str(path))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    if not register_as:
        return PublishedModel(f"models:/{logged.model_id}")
    number = _register(client, register_as, logged, run_id)
    return PublishedModel(f"models:/{register_as}@{ALIAS}", register_as, number)


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
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    address = default_uri(None)
    try:
        # MLflow's own resolution of models:/ asks the process-wide server, whatever it is given.
        where = _location(make_client(address), uri)
        return Path(
            download_artifacts(
                artifact_uri=where, dst_path=str(scratch), tracking_uri=address, registry_uri=registry_uri(address)
            )
        )
    except MlflowException as error:
        detail = redact(" ".join(str(error).split()))[:300]
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise UserError(f"no model {uri} at {redact(address)}: {detail}") from error
        raise EnvironmentFault(f"cannot fetch {uri} from {redact(address)}: {detail}") from error
    except OSError as error:
        raise EnvironmentFault(f"cannot fetch {uri} from {redact(address)}: {redact(str(error))[:300]}") from error


def _location(client: MlflowClient, uri: str) -> str:
    """Where the files of `models:/name@alias`, `models:/name/version` or `models:/model-id` lie."""
    reference = uri.removeprefix("models:/").strip("/")
    name, at, alias = reference.partition("@")
    if at:
        return client.get_model_version_download_uri(name, client.get_model_version_by_alias(name, alias).version)
    name, slash, version = reference.partition("/")
    if not slash:
        return client.get_logged_model(name).artifact_location
    if not version.isdecimal():
        raise UserError(f"{uri} names no version; write models:/{name}/3 or models:/{name}@{ALIAS}")
    return client.get_model_version_download_uri(name, version)


def _register(client: MlflowClient, name: str, logged: Any, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(name, logged.artifact_location, run_id=run_id, model_id=logged.model_id)
    client.set_registered_model_alias(name, ALIAS, made.version)
    return str(made.version)


def _public(package: str) -> str:
    """The version without its build's local part (2.13.0+cpu), which no registry carries."""
    return version(package).partition("+")[0]
