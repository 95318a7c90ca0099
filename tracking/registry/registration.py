"""Registration of a finished run, from its folder or from its MLflow run.

A model that is in MLflow already is registered in place. Otherwise (a run with `tracking.enabled=false`)
it is logged first, with its configuration, journal and model card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import EnvironmentFault, UserError, redact
from ...inference.package import find_folder, read_manifest
from ...reports.card import write_card
from ...reports.facts import RunFacts
from ...reports.run_folder import CARD
from ...storage.open import require_local
from ..address import absolute_uri, default_uri
from ..outbox import OutboxState
from ..runs import TrackedRun
from .client import opened
from .lineage import FINGERPRINT
from .models import PublishedModel, checked, logged_model, register

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Registered:
    """The registered version of a run; `fresh` if it was created by this call."""

    name: str
    version: str
    fresh: bool


def register_run(run: str, name: str | None = None) -> Registered:
    """Register the model of a finished run folder, or of an MLflow run, under `name` or the name of the run.

    Raises:
        UserError: no such run, or it is not finished, tracked by another server, or without a model.
    """
    require_local(run, "RUN")
    folder = Path(run)
    if folder.is_dir():
        return _register_folder(folder, name)
    if not _RUN_ID.fullmatch(run):
        raise UserError(f"{run[:200]} is neither a run folder, such as runs/digits, nor the id of an MLflow run")
    with opened(f"no MLflow run {run}") as client:
        logged = logged_model(client, run)
        if logged is None:
            raise UserError(f"MLflow run {run} has logged no glann model; give its run folder")
        return _register_logged(client, logged, run, name or client.get_run(run).info.run_name)


def _register_folder(folder: Path, name: str | None) -> Registered:
    facts = RunFacts.read(folder)
    if not facts.finished:
        raise UserError(f"{folder} has not finished; the same `glann train` resumes it")
    name, address = checked(name or facts.config.name), default_uri(None)
    state = OutboxState.load(folder)
    if state and state.run_id:
        if absolute_uri(state.uri) != absolute_uri(redact(address)):
            raise UserError(f"{folder} is tracked at {state.uri}, not at {redact(address)}; set MLFLOW_TRACKING_URI")
        with opened(f"the MLflow run of {folder} is not") as client:
            if logged := logged_model(client, state.run_id):
                return _register_logged(client, logged, state.run_id, name)
    model = _track(facts, name, address)
    return Registered(name, str(model.version), fresh=True)


def _register_logged(client: MlflowClient, logged: LoggedModel, run_id: str, name: str) -> Registered:
    for version in client.search_model_versions(f"name='{checked(name)}'"):
        if version.source == logged.artifact_location:
            return Registered(name, str(version.version), fresh=False)
    return Registered(name, str(register(client, name, logged, run_id).version), fresh=True)


def _track(facts: RunFacts, name: str, address: str) -> PublishedModel:
    """Send a finished run that is not, or not completely, in MLflow, and register its model."""
    folder = facts.run_dir
    model = find_folder(folder)
    tracking = facts.config.tracking.model_copy(update={"enabled": True, "uri": address, "register_as": name})
    run = TrackedRun.open(
        facts.config.model_copy(update={"tracking": tracking}),
        folder,
        {FINGERPRINT: read_manifest(model).fingerprint},
    )
    card = folder / CARD if (folder / CARD).is_file() else write_card(folder, run.tracked_as)
    run.log_artifact(card)
    run.describe(card)
    run.log_model(model)
    run.finish()
    if run.model is None:
        raise EnvironmentFault(f"the model of {folder} did not reach {redact(address)}; run the same command again")
    return run.model
