"""The tracked run of a `glann train`: its journal in the run folder, and the same run in MLflow.

    run = TrackedRun.open(config, run_dir, {"glann.data_fingerprint": fingerprint})
    run.log_metrics({"stage": "glo", "epoch": 3, "loss": 0.31}, step=120)
    run.log_image(run_dir / "images" / "glo-epoch-003-samples.png")
    run.finish("FINISHED")

The journal is written first and by the caller's thread; MLflow is fed from it in the background.  A
server that is away when the run starts is an error, one that goes away later is a warning.
"""

from __future__ import annotations

import logging
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ..config.parse import flatten
from ..config.run import Config, redacted_config
from ..reports.card import TrackedAs
from ..reports.run_folder import IMAGES, JOURNAL, TRACKED_CONFIG
from ..storage.files import os_fault, write_whole
from ..storage.journal import Journal
from .connection import default_uri, experiment_id, reach, redact
from .outbox import Outbox, OutboxState, Parcel
from .registry.lineage import PARENT, STUDY, TRIAL
from .registry.models import PublishedModel

if TYPE_CHECKING:
    from mlflow import MlflowClient
log = logging.getLogger("glann.tracking")
RUN_TAG = "glann.run_id"
Status = Literal["FINISHED", "FAILED", "KILLED"]
MAX_KEY, MAX_VALUE, MAX_PARAMS = 250, 6000, 100  # MLflow's limits
FINISH_TIMEOUT_S = 120.0


class TrackedRun:
    """One run: open it with `TrackedRun.open`, end it with `finish`.  Without MLflow it keeps the journal alone."""

    def __init__(self, run_dir: Path, outbox: Outbox | None) -> None:
        self.run_dir = run_dir
        self.journal = Journal(run_dir / JOURNAL)
        self._outbox = outbox

    @classmethod
    def open(
        cls,
        config: Config,
        run_dir: Path,
        tags: dict[str, str] | None = None,
        *,
        parent_run_id: str | None = None,
    ) -> Self:
        """Open the run of this folder: the one it had before a restart, or a new one.

        Args:
            tags: facts about the run such as the fingerprint of its data.
            parent_run_id: MLflow run of the study that this run is part of.
        Raises:
            UserError: the tracking server does not answer, or refuses.
        """
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_fault(error, run_dir) from error
        if not config.tracking.enabled:
            return cls(run_dir, None)
        uri = default_uri(config.tracking.uri)
        state = _state_of(run_dir, redact(uri))
        state.save(run_dir)  # the key is on disk before the run is made: a crash in between loses no run
        tags = _all_tags(config, tags or {}, state.key, parent_run_id)
        lineage = state.lineage | {name: tags[name] for name in (STUDY, TRIAL, PARENT) if name in tags}
        client, run_id = reach(uri, lambda client: (client, _enter(client, config, state, tags)))
        if state.run_id not in (None, run_id):
            log.warning(
                "MLflow run %s of %s is gone from %s; a new one gets everything", state.run_id, run_dir, state.uri
            )
            state = state.model_copy(update={"sent_bytes": 0})
        state = state.model_copy(update={"run_id": run_id, "lineage": lineage, "ended": False})
        state.save(run_dir)
        write_whole(run_dir / TRACKED_CONFIG, redacted_config(config).to_yaml())
        run = cls(run_dir, Outbox(client, run_id, run_dir, state, config.tracking.register_as))
        run.log_artifact(run_dir / TRACKED_CONFIG)
        return run

    @staticmethod
    def waits(run_dir: Path) -> bool:
        """Whether MLflow has not taken everything of a run that was tracked."""
        state = OutboxState.load(run_dir)
        return state is not None and not state.ended

    @property
    def tracked_as(self) -> TrackedAs:
        """What the model card says of the run."""
        state = self._outbox.state if self._outbox else OutboxState.load(self.run_dir)
        if state is None:
            return TrackedAs()
        return TrackedAs(state.run_id, state.lineage.get(STUDY), state.lineage.get(TRIAL))

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None where tracking is off."""
        return self._outbox.run_id if self._outbox else None

    @property
    def model(self) -> PublishedModel | None:
        """Where the model went in MLflow, once it has gone (after `finish`)."""
        return self._outbox.model if self._outbox else None

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Add an entry to the journal: numbers, with `stage` and `epoch` beside them.  Never waits for the server."""
        self.journal.append(metrics | {"step": step})

    def log_image(self, path: Path) -> None:
        """Have a picture of the run folder sent to MLflow, under images/."""
        self.log_artifact(path, IMAGES)

    def log_artifact(self, path: Path, target: str | None = None) -> None:
        """Have a file sent to MLflow, into the folder `target` of the run's artifacts."""
        self._send("artifact", path, target)

    def log_model(self, folder: Path) -> None:
        """Have the packaged model logged as a pyfunc, and registered if `tracking.register_as` is set."""
        self._send("model", folder, None)

    def finish(self, status: Status = "FINISHED", timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """End the run; what the server does not take within `timeout_s` is kept, and said."""
        self.journal.close()
        if self._outbox and not self._outbox.close(status, timeout_s):
            log.warning(
                "%s did not reach MLflow and wait in %s; run the same command again to send them",
                self._outbox.waiting() or "its last words",
                self.run_dir,
            )

    def _send(self, kind: Literal["artifact", "model"], path: Path, target: str | None) -> None:
        if self._outbox is None:
            return
        path = path.absolute()
        home = self.run_dir.absolute()
        name = path.relative_to(home) if path.is_relative_to(home) else path
        self._outbox.put(Parcel(kind=kind, path=str(name), target=target))


def code_revision(folder: Path = Path(__file__).parent) -> str | None:
    """The git commit of the source that runs, with `-dirty` where it was changed; None for an installed package."""
    described = [_git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")]
    if not described[0]:
        return None
    return described[0] + ("-dirty" if described[1] else "")


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here, hence no revision to tell
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _state_of(run_dir: Path, uri: str) -> OutboxState:
    """Where this folder stands with the server; another server than last time gets everything from the start."""
    state = OutboxState.load(run_dir)
    if state is None or state.uri != uri:
        return OutboxState(key=uuid.uuid4().hex, uri=uri)
    journal = run_dir / JOURNAL
    held = journal.stat().st_size if journal.exists() else 0  # less, where the journal is an older copy
    return state.model_copy(update={"sent_bytes": min(state.sent_bytes, held)})


def _all_tags(config: Config, tags: dict[str, str], key: str, parent_run_id: str | None) -> dict[str, str]:
    all_tags = {RUN_TAG: key, "glann.data": redact(config.data.url), **tags}
    if parent_run_id:
        all_tags["mlflow.parentRunId"] = parent_run_id
    if revision := code_revision():
        all_tags["mlflow.source.git.commit"] = revision
    return {name: redact(str(value)) for name, value in all_tags.items()}


def _enter(client: MlflowClient, config: Config, state: OutboxState, tags: dict[str, str]) -> str:
    """Find the run again or make it, and bring its tags and parameters up to date."""
    from mlflow.entities import Param, RunTag

    experiment = experiment_id(client, config.tracking.experiment)
    found = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{state.key}'", max_results=1)
    if found:
        run = found[0]
        client.update_run(run.info.run_id, status="RUNNING")
    else:
        run = client.create_run(experiment, tags=tags, run_name=config.name)
    params = {key[:MAX_KEY]: str(value)[:MAX_VALUE] for key, value in _params(config).items()}
    known = run.data.params
    fresh = [Param(key, value) for key, value in params.items() if key not in known]
    # MLflow's parameters never change; what a resumed run does differently (more workers, say) is a tag
    changed = {f"glann.now.{key}": value for key, value in params.items() if known.get(key, value) != value}
    run_tags = [RunTag(name, value) for name, value in (tags | changed).items()]
    for start in range(0, max(len(fresh), len(run_tags)), MAX_PARAMS):
        chunk = slice(start, start + MAX_PARAMS)
        client.log_batch(run.info.run_id, params=fresh[chunk], tags=run_tags[chunk])
    return run.info.run_id


def _params(config: Config) -> dict[str, Any]:
    return flatten(redacted_config(config).model_dump(mode="json"))
