"""The tracked run of `glann train`: its journal in the run folder, and its MLflow run.

    run = TrackedRun.open(config, run_dir, {"glann.data_fingerprint": fingerprint})
    run.log_metrics({"stage": "glo", "epoch": 3, "loss": 0.31}, step=120)
    run.log_image(run_dir / "images" / "glo-epoch-003-samples.png")
    run.finish("FINISHED")

The journal is written first, in the caller's thread; it is sent to MLflow in the background.  A server
that is unavailable when the run starts is an error; one that becomes unavailable later is a warning.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ..cluster.jobs.revision import code_revision
from ..config.parse import flatten
from ..config.run import Config, redacted_config
from ..errors import redact
from ..reports.card import TrackedAs
from ..reports.run_folder import CARD_PICTURE, IMAGES, JOURNAL, TRACKED_CONFIG
from ..storage.files import os_fault, write_whole
from ..storage.journal import Journal
from .address import default_uri
from .connection import experiment_id, reach
from .outbox import Outbox, OutboxState, Parcel, ParcelKind
from .registry.lineage import PARENT, STUDY, TRIAL
from .registry.models import PublishedModel
from .tensorboard import EventFiles

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
log = logging.getLogger("glann.tracking")
RUN_TAG = "glann.run_id"
PAGE_VARIABLE = "GLANN_MLFLOW_PAGE"  # where people open the server, e.g. through a tunnel
SOURCE = {"mlflow.source.name": "glann", "mlflow.source.type": "JOB"}
MAX_DIGEST = 36  # characters of a data set's digest in MLflow
Status = Literal["FINISHED", "FAILED", "KILLED"]
MAX_KEY, MAX_VALUE, MAX_PARAMS = 250, 6000, 100  # MLflow's limits
FINISH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class DataInput:
    """The training images of a run, as MLflow's data set input. digest: their fingerprint."""

    url: str
    digest: str
    rows: int
    resolution: int
    channels: int


class TrackedRun:
    """One run: open it with `TrackedRun.open`, end it with `finish`.  Without MLflow only the journal is written."""

    def __init__(self, run_dir: Path, outbox: Outbox | None, event_files: EventFiles | None = None) -> None:
        self.run_dir, self.event_files = run_dir, event_files
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
        data: DataInput | None = None,
    ) -> Self:
        """Open the run of this folder: that of before a restart, or a new one.

        Args:
            tags: tags of the run, such as the fingerprint of its data.
            parent_run_id: MLflow run of the study that this run is part of.
            data: its training images.
        Raises:
            UserError: the tracking server does not respond, or rejects the request.
        """
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_fault(error, run_dir) from error
        event_files = EventFiles(run_dir) if config.tracking.tensorboard else None
        if not config.tracking.enabled:
            return cls(run_dir, None, event_files)
        uri = default_uri(config.tracking.uri)
        state = _state_of(run_dir, redact(uri))
        state.save(run_dir)  # save the key before the run is created, so that a crash in between does not lose the run
        tags = _all_tags(config, tags or {}, state.key, parent_run_id)
        lineage = state.lineage | {name: tags[name] for name in (STUDY, TRIAL, PARENT) if name in tags}
        client, (run_id, experiment) = reach(uri, lambda client: (client, _enter(client, config, state, tags, data)))
        if state.run_id not in (None, run_id):
            log.warning(
                "MLflow run %s of %s no longer exists at %s; everything is sent to a new one",
                state.run_id,
                run_dir,
                state.uri,
            )
            state = state.model_copy(update={"sent_bytes": 0})
        state = state.model_copy(
            update={"run_id": run_id, "experiment": experiment, "lineage": lineage, "ended": False}
            | {"page": os.environ.get(PAGE_VARIABLE)}
        )
        state.save(run_dir)
        write_whole(run_dir / TRACKED_CONFIG, redacted_config(config).to_yaml())
        run = cls(run_dir, Outbox(client, run_id, run_dir, state, config.tracking.register_as), event_files)
        run.log_artifact(run_dir / TRACKED_CONFIG)
        return run

    @staticmethod
    def waits(run_dir: Path) -> bool:
        """Whether a tracked run has data that was not sent to MLflow."""
        state = OutboxState.load(run_dir)
        return state is not None and not state.ended

    @property
    def tracked_as(self) -> TrackedAs:
        """The MLflow run, study and trial, for the model card."""
        state = self._outbox.state if self._outbox else OutboxState.load(self.run_dir)
        if state is None:
            return TrackedAs()
        return TrackedAs(state.run_id, state.lineage.get(STUDY), state.lineage.get(TRIAL))

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None where tracking is off."""
        return self._outbox.run_id if self._outbox else None

    @property
    def link(self) -> str | None:
        """Address of the run's page; None where tracking is off, or in a file."""
        return self._outbox.state.link if self._outbox else None

    @property
    def address(self) -> str | None:
        """Address of the run's page, or of the database that holds it; None where tracking is off."""
        return self.link or (self._outbox.state.uri if self._outbox else None)

    @property
    def model(self) -> PublishedModel | None:
        """The model in MLflow, once it was sent (after `finish`)."""
        return self._outbox.model if self._outbox else None

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Append numbers, with their `stage` and `epoch`, to the journal.  Never waits for the server."""
        self.journal.append(metrics | {"step": step})
        if self.event_files:
            self.event_files.add_numbers(metrics, step)

    def log_image(self, path: Path, key: str | None = None, step: int | None = None) -> None:
        """Queue a picture of the run folder for MLflow, under images/, and the whole images beside it.

        Args:
            key: series of pictures that it belongs to, which MLflow shows by `step`.
        """
        self.log_artifact(path, IMAGES)
        if path.with_suffix("").is_dir():
            self.log_artifact(path.with_suffix(""), IMAGES)
        if key is not None:
            self._send("image", path, key, step)
            if self.event_files and step is not None:
                self.event_files.add_image(path, key, step)

    def describe(self, card: Path) -> None:
        """Queue the model card as the description of the run, and before it the picture in it."""
        if (picture := self.run_dir / IMAGES / CARD_PICTURE).is_file():
            self.log_artifact(picture, IMAGES)
        self._send("description", card, None)

    def log_artifact(self, path: Path, target: str | None = None) -> None:
        """Queue a file or folder for MLflow, in the folder `target` of the run's artifacts."""
        self._send("artifact", path, target)

    def log_model(self, folder: Path) -> None:
        """Queue the packaged model, to be logged as a pyfunc and registered if `tracking.register_as` is set."""
        self._send("model", folder, None)

    def finish(self, status: Status = "FINISHED", timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """End the run; warn of what could not be sent within `timeout_s`, which stays queued."""
        self.journal.close()
        if self.event_files:
            self.event_files.close()
        if self._outbox and not self._outbox.close(status, timeout_s):
            log.warning(
                "%s of %s not sent to MLflow, but kept; run the same command again to send the rest",
                self._outbox.waiting() or "the final status",
                self.run_dir.name,
            )

    def _send(self, kind: ParcelKind, path: Path, target: str | None, step: int | None = None) -> None:
        if self._outbox is None:
            return
        path = path.absolute()
        home = self.run_dir.absolute()
        name = path.relative_to(home) if path.is_relative_to(home) else path
        self._outbox.put(Parcel(kind=kind, path=str(name), target=target, step=step))


def _state_of(run_dir: Path, uri: str) -> OutboxState:
    """The state of this folder's tracking; a new one, with nothing sent, if the server is another than last time."""
    state = OutboxState.load(run_dir)
    if state is None or state.uri != uri:
        return OutboxState(key=uuid.uuid4().hex, uri=uri)
    journal = run_dir / JOURNAL
    held = journal.stat().st_size if journal.exists() else 0  # the journal may be an older copy, and shorter
    return state.model_copy(update={"sent_bytes": min(state.sent_bytes, held)})


def _all_tags(config: Config, tags: dict[str, str], key: str, parent_run_id: str | None) -> dict[str, str]:
    all_tags = {RUN_TAG: key, "glann.data": redact(config.data.url), **SOURCE, **tags}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container without a passwd entry
        all_tags["mlflow.user"] = getpass.getuser()
    if parent_run_id:
        all_tags["mlflow.parentRunId"] = parent_run_id
    if revision := code_revision():
        all_tags["mlflow.source.git.commit"] = revision
    return {name: redact(str(value)) for name, value in all_tags.items()}


def _enter(
    client: MlflowClient, config: Config, state: OutboxState, tags: dict[str, str], data: DataInput | None
) -> tuple[str, str]:
    """Find or create the run, and update its tags and parameters; returns its id and its experiment's."""
    from mlflow.entities import Param, RunTag

    experiment = experiment_id(client, config.tracking.experiment)
    found = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{state.key}'", max_results=1)
    if found:
        run = found[0]
        client.update_run(run.info.run_id, status="RUNNING")
    else:
        run = client.create_run(experiment, tags=tags, run_name=config.name)
    if data is not None and not (run.inputs and run.inputs.dataset_inputs):
        client.log_inputs(run.info.run_id, [_data_input(data)])
    params = {key[:MAX_KEY]: str(value)[:MAX_VALUE] for key, value in _params(config).items()}
    known = run.data.params
    fresh = [Param(key, value) for key, value in params.items() if key not in known]
    # MLflow parameters are immutable; what differs in a resumed run (the number of workers, say) becomes a tag
    changed = {f"glann.now.{key}": value for key, value in params.items() if known.get(key, value) != value}
    run_tags = [RunTag(name, value) for name, value in (tags | changed).items()]
    for start in range(0, max(len(fresh), len(run_tags)), MAX_PARAMS):
        chunk = slice(start, start + MAX_PARAMS)
        client.log_batch(run.info.run_id, params=fresh[chunk], tags=run_tags[chunk])
    return run.info.run_id, experiment


def _data_input(data: DataInput) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    url = redact(data.url)
    dataset = Dataset(
        name=url.rstrip("/").rpartition("/")[2] or url,
        digest=data.digest[:MAX_DIGEST],
        source_type="s3" if url.startswith("s3://") else "local",
        source=json.dumps({"uri": url}),
        schema=json.dumps({"resolution": data.resolution, "channels": data.channels}),
        profile=json.dumps({"num_rows": data.rows}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _params(config: Config) -> dict[str, Any]:
    return flatten(redacted_config(config).model_dump(mode="json"))
