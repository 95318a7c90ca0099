"""Stands in for the job server of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from ray.job_submission import JobStatus


class Cluster:
    """Stands in for Ray's job server: it takes an id once, and keeps what it was given."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.logs: dict[str, str] = {}
        self.shipped: dict[str, list[str]] = {}

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata=None):
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed with status code 400: {submission_id} already exists.")
        self.shipped[submission_id] = sorted(
            path.relative_to(folder).as_posix()
            for folder in map(Path, [*runtime_env.get("py_modules", []), runtime_env["working_dir"]])
            for path in folder.rglob("*")
            if path.is_file()
        )
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id,
            entrypoint=entrypoint,
            metadata=metadata,
            runtime_env=runtime_env,
            status=JobStatus.RUNNING,
            driver_exit_code=None,
            message="Job is currently running.",
            start_time=1_000 * len(self.jobs) + 1,
            end_time=None,
        )
        self.logs[submission_id] = ""
        return submission_id

    def ends(self, job: str, status: JobStatus, code: int | None = None, log: str = "") -> None:
        self.jobs[job].status, self.jobs[job].driver_exit_code, self.logs[job] = status, code, log

    def list_jobs(self):
        return list(self.jobs.values())

    def get_job_info(self, job):
        return self.jobs[job]

    def get_job_logs(self, job):
        return self.logs[job]

    def delete_job(self, job):
        del self.jobs[job]
