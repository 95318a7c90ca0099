"""How submitted runs stand, by the file that lies beside their checkpoints; for `glann jobs`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from ..cluster.jobs.client import Job
from ..config.sections import S3Config
from ..errors import EnvironmentFault, GlannError, UserError
from ..reports.status import (
    FILE,
    GIB,
    DeviceUse,
    Status,
    checkpoint_in_words,
    devices_in_words,
    duration,
    read_status,
    status_folder,
    summary,
)
from ..storage.base import Store
from ..storage.open import local_folder, open_store

TRIES, TIMEOUT_S = 2, 5.0  # of a request to S3: a table of runs must not take minutes
AT_ONCE = 8


@dataclass(frozen=True)
class Seen:
    """The status of a run, or in words why there is none. former: it is that of an earlier attempt."""

    status: Status | None = None
    why: str = ""
    former: bool = False

    @property
    def mlflow(self) -> str:
        return (self.status and self.status.mlflow) or ""

    def line(self, now: float) -> str:
        """How it stands in a line."""
        if self.status is None:
            return self.why
        if self.status.is_stale(now):
            return f"no sign of life for {duration(now - self.status.updated)}"
        return ("earlier attempt: " if self.former else "") + summary(self.status, now)


def of_job(job: Job) -> Seen:
    """The status of the run of a job."""
    if not job.checkpoints:
        return Seen(why="unknown: the job does not say where its checkpoints are")
    seen = look(status_folder(job.checkpoints), S3Config.model_validate_json(job.s3) if job.s3 else S3Config())
    former = seen.status is not None and job.started is not None and seen.status.updated < job.started
    return Seen(seen.status, seen.why, former)


def of_jobs(jobs: Iterable[Job]) -> list[Seen]:
    """The statuses of the runs of jobs, in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(of_job, jobs))


def of_name(runs: str, name: str) -> Seen:
    """The status of a run by its name and the folder of runs (`checkpoint.url`).

    Raises:
        UserError: there is no such run. EnvironmentFault: the store does not answer.
    """
    status = read_status(_store(f"{runs.rstrip('/')}/{name}"))
    if status is None:
        raise UserError(f"{runs} has no status of a run {name}; `glann jobs list --runs {runs}` lists its runs")
    return Seen(status)


def all_in(runs: str) -> list[Seen]:
    """The statuses of all runs in a folder of runs, those that were written last first.

    Raises:
        EnvironmentFault: the store does not answer.
    """
    folders = [
        key.rpartition("/")[0] for key in _store(runs).list() if key.endswith(f"/{FILE}") and key.count("/") == 1
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [seen for seen in pool.map(lambda name: look(f"{runs.rstrip('/')}/{name}"), folders) if seen.status]
    return sorted(found, key=lambda seen: seen.status.updated if seen.status else 0.0, reverse=True)


def look(folder: str, s3: S3Config | None = None) -> Seen:
    """The status of the run in a folder, or why it cannot be read."""
    try:
        local = local_folder(folder)
        if local is not None and not local.parent.exists():
            return Seen(why=f"unknown: {local.parent} is not on this machine")
        status = read_status(_store(folder, s3))
    except GlannError as error:
        return Seen(why=f"unknown: {error}")
    return Seen(status, "" if status else "not begun yet")


def _store(url: str, s3: S3Config | None = None) -> Store:
    given = s3 or S3Config()
    return open_store(url, given.model_copy(update={"max_attempts": TRIES, "timeout_s": TIMEOUT_S}))


def described(seen: Seen) -> dict[str, str]:
    """What `glann jobs status` shows of a run beside what the cluster says of its job."""
    status, now = seen.status, time.time()
    if status is None:
        return {"progress": seen.why}
    shown = {"progress": seen.line(now)}
    if status.is_stale(now):
        shown["progress"] += f": the driver on {status.host} has died, or cannot write there"
        shown["last seen"] = summary(status, status.updated)
    if status.checkpoint_at is not None:
        shown["saved"] = f"{checkpoint_in_words(status, now)}, step {status.checkpoint_step}"
    if devices := devices_in_words(status):
        shown["devices"] = devices
        shown |= {f"  worker {device.rank}": _device(device) for device in status.devices}
    for label, score in (("measured", status.measured), ("best", status.best)):
        if score is not None:
            shown[label] = f"{score.metric} {score.value:.4g} at step {score.step}"
    if status.mlflow:
        shown["mlflow"] = status.mlflow
    shown["written"] = f"{duration(now - status.updated)} ago by {status.host}"
    return shown


def _device(device: DeviceUse) -> str:
    use = "" if device.use is None else f"{device.use:.0%}, "
    return f"{device.device} on {device.node}, {use}{device.memory / GIB:.1f} of {device.total / GIB:.1f} GiB"


@contextmanager
def hint_at_runs() -> Iterator[None]:
    """Add to the error of a cluster that does not answer what shows the status nevertheless."""
    try:
        yield
    except EnvironmentFault as error:
        raise EnvironmentFault(
            f"{error}; `--runs` and the checkpoint.url of the runs show how they stand without the cluster"
        ) from error
