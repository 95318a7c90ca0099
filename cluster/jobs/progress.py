"""The progress of a run in Ray's dashboard, as metadata of its job."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from ..nodes.ray_private import submitted_job, update_job_metadata

PROGRESS, MLFLOW = "glann.progress", "glann.mlflow"
log = logging.getLogger(__name__)


def dashboard() -> Callable[[str, str | None], None]:
    """A function of (progress in words, address in MLflow) that shows them with the job of this process.

    It does nothing in a process that was not submitted, never raises, and waits for the head for some seconds at most.
    """
    job, head = submitted_job(), os.environ.get("RAY_ADDRESS", "")
    if job is None or ":" not in head:
        return lambda progress, mlflow: None

    def show(progress: str, mlflow: str | None) -> None:
        try:
            update_job_metadata(head, job, {PROGRESS: progress} | ({MLFLOW: mlflow} if mlflow else {}))
        except Exception as error:  # of Ray's private parts: it is only shown
            log.info("the progress of %s is not in the dashboard: %s", job, error)

    return show
