"""Tags and description of a registered version, taken from its MLflow run.

    glann.fingerprint, glann.rows, glann.resolution, ...   the data it was trained on
    glann.config.KEY                                       the most important keys; all are in the run and the model
    glann.metric.NAME                                      metrics at the end of the run
    glann.run, glann.run_name, glann.study, glann.trial    origin of the model

The description of a version is the model card of its run, with its picture of samples; that of a registered model is
the description of its champion, or of its newest version while there is none.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ... import __version__
from ...config import run as config
from ...config.run import Config, keys_with
from ...config.section import Trait
from ...config.shorthands import canonical
from ...errors import UserError, redact
from ...metrics.result import canonical_keys
from ...reports.run_folder import CARD, IMAGES, TRACKED_CONFIG
from .client import fetch, locate, opened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

    from ...inference.package import ModelManifest

FINGERPRINT, RUN, RUN_NAME = "glann.fingerprint", "glann.run", "glann.run_name"
STUDY, TRIAL, PARENT = "glann.study", "glann.trial", "mlflow.parentRunId"
METRIC, CONFIG = "glann.metric.", "glann.config."
EVALUATION = "evaluation/"  # prefix of the metrics of the run's own evaluation
COPIED = {tag: tag for tag in (STUDY, TRIAL, PARENT, "glann.data")} | {"mlflow.source.git.commit": "glann.commit"}
DESCRIPTION = "mlflow.note.content"  # tag with the description of a run or a logged model
MAX_DESCRIPTION = 5000  # MLflow's database column; PostgreSQL refuses more
MAX_CONFIG_BYTES = 1 << 20
NOTE = "(The card of version {}. A description that you write in its place stays.)"  # below a registered model's
_PICTURE = re.compile(r"^!\[([^\]\n]*)\]\(([^)\n]*)\)\n+", re.MULTILINE)
_OURS = re.compile(re.escape(NOTE).replace(r"\{\}", r"\d+"))


def version_tags(run: Run, manifest: ModelManifest) -> dict[str, str]:
    """The tags of a version, with passwords removed from addresses."""
    params, metrics = run.data.params, run.data.metrics
    tags: dict[str, Any] = {
        FINGERPRINT: manifest.fingerprint,
        "glann.rows": manifest.rows,
        "glann.resolution": manifest.resolution,
        "glann.channels": manifest.channels,
        "glann.version": __version__,
        RUN: run.info.run_id,
        RUN_NAME: run.info.run_name,
    }
    given = {canonical(key): value for key, value in params.items()}
    tags |= {CONFIG + key: given[key] for key in keys_with(Trait.IN_REGISTRY) if key in given}
    measured = {name.removeprefix(EVALUATION): value for name, value in metrics.items() if name.startswith(EVALUATION)}
    tags |= {METRIC + key: f"{value:.6g}" for key, value in canonical_keys(measured).items()}
    tags |= {ours: run.data.tags[theirs] for theirs, ours in COPIED.items() if theirs in run.data.tags}
    return {name: redact(str(value)) for name, value in tags.items()}


def description(client: MlflowClient, run_id: str) -> str | None:
    """The model card of a run, cut to MLflow's limit for descriptions; None if it has none."""
    if CARD not in {file.path for file in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory(prefix="glann-card-") as scratch:
        text = Path(client.download_artifacts(run_id, CARD, scratch)).read_text(encoding="utf-8")
    pictures = {file.path for file in client.list_artifacts(run_id, IMAGES)}
    return fitted(redact(on_server(text, run_id, pictures)), f"\n\n(Cut. The whole card is {CARD} of run {run_id}.)")


def on_server(card: str, run_id: str, pictures: Collection[str]) -> str:
    """A model card whose pictures are shown by MLflow's pages.

    MLflow's Markdown drops data URIs and sizes. Its pages are at `/#/...`, so a relative address reaches the server
    that shows them, which sends artifacts of runs.

    Args:
        pictures: paths of the run's artifacts; a picture that is not among them is left out.
    """

    def shown(match: re.Match[str]) -> str:
        title, path = match.groups()
        address = f"get-artifact?path={quote(path, safe='')}&run_uuid={run_id}"
        return f"![{title}]({address})\n\n" if path in pictures else ""

    return _PICTURE.sub(shown, card)


def describe_registered(client: MlflowClient, name: str, version: ModelVersion) -> None:
    """Describe a registered model by one of its versions, unless somebody has written another description."""
    held = client.get_registered_model(name).description or ""
    if not version.description or (held and not _OURS.search(held)):
        return
    text = f"{version.description.rstrip()}\n\n{NOTE.format(version.version)}"
    client.update_registered_model(name, fitted(text, f"\n\n{NOTE.format(version.version)}"))


def fitted(text: str, note: str) -> str:
    """The text, or its first lines that fit together with `note`."""
    if len(text) <= MAX_DESCRIPTION:
        return text
    head = text[: MAX_DESCRIPTION - len(note)]
    return head[: head.rfind("\n")].rstrip() + note


def manifest_of(client: MlflowClient, logged: LoggedModel) -> ModelManifest:
    """Read model.json of a logged model.

    Raises:
        UserError: not a model of glann.
    """
    from ...inference.package import MANIFEST, read_manifest  # torch; the registry is listed without

    with tempfile.TemporaryDirectory(prefix="glann-manifest-") as scratch:
        where = f"{logged.artifact_location.rstrip('/')}/artifacts/model/{MANIFEST}"
        return read_manifest(fetch(client.tracking_uri, where, Path(scratch)).parent)


def origin(uri: str) -> Config:
    """The configuration that a registered model was trained with.

    Raises:
        UserError: no such model, or its run has no configuration.
    """
    with opened(f"no model {uri}") as client:
        run_id = locate(client, uri)[1]
        if run_id is None:
            raise UserError(f"{uri} has no MLflow run, so its configuration is unknown")
        return run_config(client, run_id)


def run_config(client: MlflowClient, run_id: str) -> Config:
    """The configuration of a run, from MLflow: without passwords, and without the cache folder.

    Raises:
        UserError: the run has no configuration, or an invalid one.
    """
    with tempfile.TemporaryDirectory(prefix="glann-config-") as scratch:
        if TRACKED_CONFIG not in {file.path for file in client.list_artifacts(run_id)}:
            raise UserError(f"MLflow run {run_id} holds no {TRACKED_CONFIG}; it was not made by `glann train`")
        path = Path(client.download_artifacts(run_id, TRACKED_CONFIG, scratch))
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{TRACKED_CONFIG} of MLflow run {run_id} is larger than {MAX_CONFIG_BYTES} bytes")
        found = config.load(path)
    # The cache deletes files as it fills: its folder is chosen here, and not taken from the server.
    return found.model_copy(update={"data": found.data.model_copy(update={"cache_dir": None})})
