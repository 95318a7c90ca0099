"""Sends metrics, files and the model to the tracking server from a background thread.

The journal (metrics.jsonl) is the queue of metrics: the outbox records the byte up to which it was sent.
Files and the model are queued in a list.  Both are stored in `tracking.json` in the run folder, so that
what could not be sent is sent once the server is available again, or when the run is next opened.
Training never waits for the server.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from ..config.section import Section
from ..errors import EnvironmentFault, GlannError, UserError, one_line
from ..reports.run_folder import IMAGES, JOURNAL, TRACKING
from ..storage import journal
from ..storage.files import read_document, write_whole
from ..storage.proxy import proxy_hint
from .registry.lineage import DESCRIPTION, on_server
from .registry.models import PublishedModel, publish

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger("glann.tracking")

POLL_S = 2.0
MAX_DELAY_S = 60.0
PATIENCE_S = 30.0  # how long a run that has ended waits for a failing server
MAX_METRICS = 1000  # per request, MLflow's limit
MAX_DESCRIPTION = 8000  # characters of a tag's value
_NOT_METRICS = ("stage", "step", "time")
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.\- :/]")


ParcelKind = Literal["artifact", "image", "description", "model"]


class Parcel(Section):
    """A file (or the model folder) to send; `path` is relative if it lies in the run folder.

    target: folder of an artifact, or series of an image, which has a `step`.
    """

    kind: ParcelKind
    path: str
    target: str | None = None
    step: int | None = None


class OutboxState(Section):
    """The content of tracking.json: the MLflow run of this folder, and what has been sent to it."""

    key: str = Field(description="value of the tag glann.run_id, generated before the run is created")
    uri: str = Field(description="tracking server, without credentials")
    run_id: str | None = None
    experiment: str | None = Field(None, description="id of the run's experiment")
    sent_bytes: int = Field(0, ge=0, description="bytes of metrics.jsonl that were sent")
    page: str | None = Field(None, description="address of the server's pages for people, if it is another one")
    parcels: tuple[Parcel, ...] = ()
    ended: bool = Field(False, description="whether everything, the final status included, was sent")
    lineage: dict[str, str] = Field({}, description="tags of the run that name its study and trial")

    @property
    def link(self) -> str | None:
        """Address of the run's page; None where it is tracked in a file.

        Without the workflow type MLflow opens on a page that has no model registry.
        """
        if self.experiment is None or not self.uri.startswith(("http://", "https://")):
            return None
        page = f"experiments/{self.experiment}/runs/{self.run_id}"
        return f"{(self.page or self.uri).rstrip('/')}/#/{page}?workflowType=machine_learning"

    @classmethod
    def load(cls, run_dir: Path) -> OutboxState | None:
        path = run_dir / TRACKING
        if not path.exists():
            return None
        try:
            state = cls.model_validate(journal.strict_json(read_document(path)))
        except (ValidationError, ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path} is damaged; remove it (the run will appear once more in MLflow)") from error
        home = Path(os.path.realpath(run_dir))  # resolve() raises at a loop of links
        for parcel in state.parcels:  # a run folder from elsewhere must not cause other local files to be sent
            if "\0" in parcel.path or not Path(os.path.realpath(home / parcel.path)).is_relative_to(home):
                raise UserError(f"{path} lists {parcel.path[:200]!r}, which is outside this run; remove {path}")
        return state

    def save(self, run_dir: Path) -> None:
        write_whole(run_dir / TRACKING, self.model_dump_json(indent=2) + "\n")


class Unnoted(EnvironmentFault):
    """The run folder could not record what was sent; not an error of the server."""


class Outbox:
    """The sending thread of one run."""

    def __init__(
        self, client: MlflowClient, run_id: str, run_dir: Path, state: OutboxState, register_as: str | None
    ) -> None:
        self._client, self._run_dir, self._register_as = client, run_dir, register_as
        self.run_id = run_id
        self._state = state
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._status, self._give_up_at, self._ended = "", 0.0, False
        self._failing_since: float | None = None
        self.model: PublishedModel | None = None
        self._thread = threading.Thread(target=self._loop, name="glann-mlflow", daemon=True)
        self._thread.start()

    @property
    def state(self) -> OutboxState:
        """What has been sent so far."""
        return self._state

    def put(self, parcel: Parcel) -> None:
        """Queue a file; a file that is queued already (a grid that was redrawn) is sent once."""
        with self._lock:
            others = tuple(waiting for waiting in self._state.parcels if waiting != parcel)
            self._update(parcels=(*others, parcel))

    def close(self, status: str, timeout_s: float) -> bool:
        """Send the rest and the final status within `timeout_s`.  False if something remains; it stays queued."""
        self._status, self._give_up_at = status, time.monotonic() + PATIENCE_S
        self._closing.set()
        self._thread.join(timeout_s)
        return self._ended

    def waiting(self) -> str:
        """A description of what has not been sent; empty if everything was."""
        path = self._run_dir / JOURNAL
        behind = (path.stat().st_size if path.exists() else 0) - self._state.sent_bytes
        parts = [f"{behind / 1024:.1f} KiB of metrics"] if behind > 0 else []
        parts += [f"{len(self._state.parcels)} files"] if self._state.parcels else []
        return " and ".join(parts)

    def _loop(self) -> None:
        delay_s = POLL_S
        while True:
            closing = self._closing.wait(delay_s)
            try:
                self._send_metrics()
                self._send_parcels()
                if closing and not self.waiting():
                    self._client.set_terminated(self.run_id, self._status)
                    with self._lock:
                        self._update(ended=True)
                    self._ended = True
            except Exception as error:  # of MLflow's client, HTTP, database or disk: training must not fail
                self._say_failing(error)
                if closing:
                    if isinstance(error, Unnoted) or time.monotonic() > self._give_up_at:
                        return
                    time.sleep(POLL_S)
                delay_s = min(2 * delay_s, MAX_DELAY_S)
                continue
            self._say_working()
            if self._ended:
                return
            delay_s = POLL_S

    def _send_metrics(self) -> None:
        batch: list[Metric] = []
        end = self._state.sent_bytes
        for offset, entry in journal.read(self._run_dir / JOURNAL, end):
            metrics = to_metrics(entry)
            if batch and len(batch) + len(metrics) > MAX_METRICS:
                self._send_batch(batch, end)
                batch = []
            batch += metrics
            end = offset
        if end > self._state.sent_bytes:
            self._send_batch(batch, end)

    def _send_batch(self, batch: list[Metric], end: int) -> None:
        if batch:
            self._client.log_batch(self.run_id, metrics=batch)
        with self._lock:
            self._update(sent_bytes=end)

    def _send_image(self, path: Path, parcel: Parcel) -> None:
        from PIL import Image

        try:
            with Image.open(path) as image:
                image.load()
        except OSError as error:
            log.warning("%s is not shown in MLflow: %s", path, one_line(error))
        else:
            self._client.log_image(self.run_id, image, key=parcel.target, step=parcel.step, synchronous=True)

    def _describe(self, card: Path) -> None:
        pictures = {file.path for file in self._client.list_artifacts(self.run_id, IMAGES)}
        text = on_server(card.read_text("utf-8"), self.run_id, pictures)
        self._client.set_tag(self.run_id, DESCRIPTION, text[:MAX_DESCRIPTION])

    def _send_parcels(self) -> None:
        for parcel in self._state.parcels:
            path = self._run_dir / parcel.path
            if not path.exists():
                log.warning("%s is gone and cannot be sent to MLflow", path)
            elif parcel.kind == "model":
                self._send_metrics()  # the run's own evaluation becomes tags of the version
                self.model = publish(self._client, self.run_id, path, self._register_as)
            elif parcel.kind == "image":
                self._send_image(path, parcel)
            elif parcel.kind == "description":
                self._describe(path)
            else:
                self._client.log_artifact(self.run_id, str(path), parcel.target)
            with self._lock:
                self._update(parcels=tuple(waiting for waiting in self._state.parcels if waiting != parcel))

    def _update(self, **changes: Any) -> None:
        self._state = self._state.model_copy(update=changes)
        try:
            self._state.save(self._run_dir)
        except GlannError as error:
            raise Unnoted(str(error)) from error

    def _say_failing(self, error: Exception) -> None:
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            detail = one_line(error)
            wrong = f"the MLflow server {self._state.uri} does not accept metrics"
            hint = proxy_hint(self._state.uri, reads_all_proxy=True)
            if isinstance(error, Unnoted):
                wrong, hint = "metrics are not sent to MLflow, because what was sent cannot be recorded", ""
            kept = self._run_dir / JOURNAL
            log.warning("%s (%s); training continues, they are kept in %s and sent later%s", wrong, detail, kept, hint)

    def _say_working(self) -> None:
        if self._failing_since is not None:
            away_s = time.monotonic() - self._failing_since
            log.warning("metrics go to MLflow at %s again after %.0f s; everything was sent", self._state.uri, away_s)
            self._failing_since = None


def to_metrics(entry: journal.Entry) -> list[Metric]:
    """Convert the numbers of a journal entry to MLflow metrics, named `stage/name`."""
    from mlflow.entities import Metric

    prefix = f"{entry['stage']}/" if entry.get("stage") else ""
    timestamp_ms = int(float(entry.get("time") or 0) * 1000)
    step = int(entry.get("step") or 0)
    return [
        Metric(_FORBIDDEN.sub("_", prefix + name)[:250], float(value), timestamp_ms, step)
        for name, value in entry.items()
        if name not in _NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool)
    ][:MAX_METRICS]
