"""The packaged model in MLflow: logged as a pyfunc, and registered as a version.

Every call uses an explicit client with an explicit address; MLflow's process-wide settings are not
changed.
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
from ...metrics.result import from_key
from .client import CHALLENGER, CHAMPION
from .lineage import DESCRIPTION, EVALUATION, describe_registered, description, manifest_of, version_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
NAME = "generator"  # name of the logged model in its run
MANIFEST_TAG = "glann.manifest"  # tag of a logged model: SHA-256 of its model.json
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
INPUT_EXAMPLE = {"n": 4, "seed": 0, "truncation": 1.0}


@dataclass(frozen=True)
class PublishedModel:
    """A model in MLflow: `uri` loads it; `version` is its number in the registry, if registered."""

    uri: str
    name: str | None = None
    version: str | None = None


def publish(client: MlflowClient, run_id: str, folder: Path, register_as: str | None) -> PublishedModel:
    """Log the model folder as a pyfunc of the run and, if a name is given, register it.

    Idempotent: it can be called again after any error.
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
    if card := description(client, run_id):
        client.set_logged_model_tags(logged.model_id, {DESCRIPTION: card})
    step = _link_metrics(client, run, logged)
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in [output.model_id for output in outputs]:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
    if not register_as:
        return PublishedModel(f"models:/{logged.model_id}")
    for made in client.search_model_versions(f"name = '{checked(register_as)}' and run_id = '{run_id}'"):
        if made.source == logged.artifact_location:  # MLflow does not store the model id
            client.set_registered_model_alias(register_as, CHALLENGER, made.version)
            return PublishedModel(f"models:/{register_as}@{CHALLENGER}", register_as, str(made.version))
    return register(client, register_as, logged, run_id)


def _begun(client: MlflowClient, run: Run, folder: Path) -> LoggedModel:
    """The logged model of this folder in its run, identified by its manifest; created if it does not exist."""
    from ...inference.package import MANIFEST  # torch; the registry is listed without

    manifest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    run_id, experiment = run.info.run_id, run.info.experiment_id
    for logged in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"):
        if logged.tags.get(MANIFEST_TAG) == manifest:
            return logged
    return client.create_logged_model(
        experiment, name=NAME, source_run_id=run_id, tags={MANIFEST_TAG: manifest}, params=run.data.params
    )


def _link_metrics(client: MlflowClient, run: Run, logged: LoggedModel) -> int:
    """Give a logged model the last values of its run's evaluation, and the data they refer to; returns their step.

    Values against held-out images name no data: the run has the training images only as its input.
    """
    from mlflow.entities import Metric

    inputs = run.inputs.dataset_inputs if run.inputs else []
    data = (inputs[0].dataset.name, inputs[0].dataset.digest) if inputs else (None, None)
    metrics = []
    for name in run.data.metrics:
        if not name.startswith(EVALUATION):
            continue
        last = max(client.get_metric_history(run.info.run_id, name), key=lambda one: (one.step, one.timestamp))
        trained_on = from_key(name.removeprefix(EVALUATION)).reference is None
        about = (logged.model_id, *(data if trained_on else (None, None)))
        metrics.append(Metric(name, last.value, last.timestamp, last.step, *about))
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics)
    return max((metric.step for metric in metrics), default=0)


def register(client: MlflowClient, name: str, logged: LoggedModel, run_id: str) -> PublishedModel:
    """Register a logged model as the newest version of a name, the `challenger`, with the tags of `lineage`.

    Raises:
        UserError: an invalid name, or a model that is not of glann.
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
    if CHAMPION not in client.get_registered_model(name).aliases:
        describe_registered(client, name, made)
    return PublishedModel(f"models:/{name}@{CHALLENGER}", name, str(made.version))


def logged_model(client: MlflowClient, run_id: str) -> LoggedModel | None:
    """The latest model that a run has logged; None if there is none."""
    run = client.get_run(run_id)
    outputs = run.outputs.model_outputs if run.outputs else []
    found = [client.get_logged_model(output.model_id) for output in outputs]
    ours = [logged for logged in found if logged.name == NAME]
    return max(ours, key=lambda logged: logged.creation_timestamp, default=None)


def checked(name: str) -> str:
    """Return the name of a registered model if it is valid.

    Raises:
        UserError: it is not.
    """
    if not MODEL_NAME.fullmatch(name):
        raise UserError(
            f"{name[:120]!r} is not a valid model name: use letters, digits, dots, dashes and underscores, at most 100"
        )
    return name


def save_pyfunc(folder: Path, path: Path, **identity: Any) -> None:
    """Write an MLflow model: the packaged model as an artifact, and the code that loads it (no pickle).

    Its requirements are these versions of glann, MLflow and torch; `mlflow models serve` needs an environment
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
    """The signature: n, seed and truncation (the last two optional) -> uint8 images [n, H, W, C]."""
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
    """The version of a package without its local part (2.13.0+cpu), which package indices do not have."""
    return version(package).partition("+")[0]
