"""The packaged model in MLflow: logged as a pyfunc, registered as a version of a name, and fetched from there.

Every call goes through an explicit client with an explicit address; MLflow's process-wide settings
are left as the user has them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...errors import UserError
from ...inference.package import MANIFEST
from .client import CHALLENGER
from .lineage import description, manifest_of, version_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
NAME = "generator"  # of the logged model within its run
MANIFEST_TAG = "glann.manifest"  # of a logged model: SHA-256 of the file that names its files and their hashes
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


def _public(package: str) -> str:
    """The version without its build's local part (2.13.0+cpu), which no registry carries."""
    return version(package).partition("+")[0]
