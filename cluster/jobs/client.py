"""Client for runs as jobs of a Ray cluster: submit, list, follow and stop them through the dashboard.

A job has its run's name. Ray's id of it is `NAME.1`, and `NAME.2` after it was submitted again: attempts at one run,
which share its checkpoints. There is at most one active attempt, because Ray accepts an id only once.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ...config.run import Config
from ...errors import EnvironmentFault, ExitStatus, UserError, redact
from ...storage.proxy import proxy_hint
from ..nodes.address import is_host
from ..nodes.ray_private import enable_token_auth, quiet_job_client, with_timeout
from . import shipping

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"  # read by Ray; it would override the given address
NAME, ATTEMPT, DIGEST, CHECKPOINTS = "glann.name", "glann.attempt", "glann.config", "glann.checkpoints"
S3, JOB_NAME = "glann.s3", "job_name"  # how to reach the checkpoints, as JSON; the name that Ray knows a job by
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 120.0
POLL_S = 1.0
SILENCE_S = 30.0  # without a line of log for so long, check that the cluster still answers
RECONNECTS = 5
HEAD_STARTS = 9  # retries, each after the 10 s that the dashboard waits for the agent that starts jobs
STOP_MARGIN_S = 60.0


@dataclass(frozen=True)
class Job:
    """One attempt at a run, as reported by the cluster. Times are seconds since 1970."""

    id: str
    name: str
    attempt: int
    state: str  # pending, running, stopped, succeeded or failed
    exit_status: int | None
    message: str
    started: float | None
    ended: float | None
    digest: str
    checkpoints: str
    s3: str
    variables: tuple[str, ...]  # names only

    @property
    def active(self) -> bool:
        return self.state in ("pending", "running")


def connect(address: str) -> JobSubmissionClient:
    """Connect to the dashboard at `address`, with the token of this machine if there is one.

    Raises:
        UserError: not an http address, or a missing or wrong token. EnvironmentFault: no answer.
    """
    if not re.match(r"[A-Za-z]+:/", address):
        address = f"http://{address}"
    if not _is_http(address):
        raise UserError(f"--address {address}: give the dashboard's, such as http://HEAD:8265")
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client; `submit_job` retries while a head that has just started has no agent yet."""

        def submit_job(self, **given: Any) -> str:
            for _ in range(HEAD_STARTS):
                try:
                    return super().submit_job(**given)
                except RuntimeError as error:
                    if "No available agent" not in str(error):
                        raise
            return super().submit_job(**given)

    quiet_job_client()
    given = {key: os.environ.pop(key) for key in (ADDRESS_VARIABLE, "RAY_ADDRESS") if key in os.environ}
    try:
        with one_line_errors(address):
            enable_token_auth()
            return with_timeout(Client, CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S)(address)
    finally:
        os.environ.update(given)


def _is_http(address: str) -> bool:
    try:
        split = urlsplit(address)
        return split.scheme in ("http", "https") and is_host(split.hostname) and split.port != 0 and " " not in address
    except ValueError:  # half a bracket, or a port that is no number
        return False


@contextmanager
def one_line_errors(address: str) -> Iterator[None]:
    """Raise errors of the job server as UserError or EnvironmentFault, in one line."""
    import requests
    from ray.exceptions import AuthenticationError

    hint = proxy_hint(address, reads_all_proxy=True)
    try:
        yield
    except AuthenticationError as error:
        if any(words in str(error) for words in ("cannot be opened", "couldn't find")):  # nothing was sent
            raise UserError(
                f"no token to send to {address}: RAY_AUTH_MODE or RAY_AUTH_TOKEN_PATH is set, and the token's file "
                "(~/.ray/auth_token) cannot be read; copy the head's there"
            ) from error
        kind = (
            "none was sent" if "required" in str(error).split("\n", 1)[0].lower() else "the one that was sent is wrong"
        )
        raise UserError(
            f"{address} requires a token and {kind}; copy the head's ~/.ray/auth_token here and set RAY_AUTH_MODE=token"
        ) from error
    except (ConnectionError, requests.RequestException) as error:
        raise EnvironmentFault(
            f"no Ray dashboard answers at {address}; check --address, or the tunnel to it (docs/cluster.md){hint}"
        ) from error
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # typer.Exit is a RuntimeError too
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = lines[0][:160] if lines else type(error).__name__
        last = f" ... {lines[-1][:160]}" if len(lines) > 1 else ""
        raise EnvironmentFault(f"{address}: {first}{last}{hint}") from error


def from_details(details: JobDetails) -> Job | None:
    """The job, or None if it was not submitted by `glann submit`."""
    metadata = details.metadata or {}
    if NAME not in metadata or details.submission_id is None:
        return None
    variables = sorted((details.runtime_env or {}).get("env_vars") or {})
    return Job(
        id=details.submission_id,
        name=metadata[NAME],
        attempt=int(metadata[ATTEMPT]),
        state=details.status.value.lower(),
        exit_status=details.driver_exit_code,
        message=(details.message or "").splitlines()[0] if details.message else "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        digest=metadata.get(DIGEST, ""),
        checkpoints=metadata.get(CHECKPOINTS, ""),
        s3=metadata.get(S3, ""),
        variables=tuple(name for name in variables if name != "RAY_JOB_STOP_WAIT_TIME_S"),
    )


def list_jobs(client: JobSubmissionClient) -> list[Job]:
    """All attempts at all runs on this cluster, the newest first."""
    jobs = [job for details in client.list_jobs() if (job := from_details(details))]
    return sorted(jobs, key=lambda job: (job.started or 0.0, job.attempt), reverse=True)


def find(client: JobSubmissionClient, name: str) -> Job:
    """The last attempt at the run of that name, or the attempt with that id.

    Raises:
        UserError: there is none on this cluster.
    """
    jobs = list_jobs(client)
    if attempts := [job for job in jobs if job.name == name]:
        return max(attempts, key=lambda job: job.attempt)
    for job in jobs:
        if job.id == name:
            return job
    names = ", ".join(sorted({job.name for job in jobs})) or "none"
    raise UserError(f"no job {name} on this cluster; jobs: {names}")


def last_attempt(client: JobSubmissionClient, name: str) -> Job | None:
    return max((job for job in list_jobs(client) if job.name == name), key=lambda job: job.attempt, default=None)


def refuse_fork(running: Job, config: Config, study: str = "") -> None:
    """Refuse to submit another configuration, or study, under the name of an active one.

    Raises:
        UserError: the active attempt has another configuration.
    """
    if running.digest != shipping.digest(config, study):
        raise UserError(
            f"{running.id} is {running.state} with another configuration; stop it first "
            f"(`glann jobs stop {running.name}`; the new job resumes its checkpoints) or give another --name"
        )


def start(
    client: JobSubmissionClient, config: Config, variables: dict[str, str], last: Job | None, study: str = ""
) -> Job:
    """Submit the next attempt at the run, or study, `config.name`.

    Args:
        config: from `shipping.for_cluster`; of a study, that of its base recipe.
        variables: environment variables of the job, by name; it gets no others from this process.
        last: the previous attempt, which has ended.
        study: YAML of a study; empty for a run.
    Raises:
        UserError: another submission started the run at the same moment.
    """
    attempt = last.attempt + 1 if last else 1
    # Ray reads this from the job's environment: the time that a stopped job has to save before it is killed.
    stop_wait = math.ceil(config.checkpoint.timeout_s + STOP_MARGIN_S)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            job = client.submit_job(
                entrypoint=shipping.entrypoint(config.name),
                submission_id=f"{config.name}.{attempt}",
                runtime_env={
                    "py_modules": [str(shipping.stage_package(folder))],
                    "working_dir": str(shipping.stage_run(folder, config, study)),
                    "env_vars": variables | {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait)},
                },
                metadata={
                    NAME: config.name,
                    ATTEMPT: str(attempt),
                    DIGEST: shipping.digest(config, study),
                    CHECKPOINTS: redact(config.checkpoint_url),
                    S3: redact(config.s3.model_dump_json()),
                    JOB_NAME: config.name,
                },
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise UserError(f"another submission has just started {config.name}; see `glann jobs list`") from error
            raise
    return find(client, job)


def follow(client: JobSubmissionClient, job: Job, write: Callable[[str], Any]) -> None:
    """Pass the job's log to `write` as it grows, until the job ends; reconnects after dropped connections.

    Raises:
        EnvironmentFault: the cluster does not answer any more.
    """
    seen = failures = 0

    def take(text: str) -> None:
        nonlocal seen
        seen += len(text)
        write(text)

    while True:
        try:
            asyncio.run(_copy_log(client, job.id, seen, take))
            if not refreshed(client, job).active:
                return
        except (OSError, RuntimeError, _client_errors()) as error:
            failures += 1
            if failures > RECONNECTS:
                raise EnvironmentFault(
                    f"lost the cluster while following {job.id}; once it is back: `glann jobs status {job.name}`, "
                    "and if the job is gone, the same `glann submit` resumes its checkpoints"
                ) from error
        time.sleep(POLL_S)


def _client_errors() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError


async def _copy_log(client: JobSubmissionClient, job_id: str, skip: int, write: Callable[[str], None]) -> None:
    """Copy the log from character `skip` on; polls the job while the log is silent, to detect a dead connection."""
    lines = client.tail_job_logs(job_id)
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(lines.__anext__())
            if not (await asyncio.wait({waiting}, timeout=SILENCE_S))[0]:
                await asyncio.to_thread(client.get_job_info, job_id)
                continue
            text, waiting = waiting.result(), None
            if fresh := text[skip:]:
                write(fresh)
            skip = max(0, skip - len(text))
    except StopAsyncIteration:
        return
    finally:
        if waiting is not None:
            waiting.cancel()


def refreshed(client: JobSubmissionClient, job: Job) -> Job:
    """The same attempt with its present state."""
    now = from_details(client.get_job_info(job.id))
    if now is None:
        raise EnvironmentFault(f"{job.id} is no longer in the cluster's list of jobs; submit it again")
    return now


def exit_status(client: JobSubmissionClient, job: Job) -> int:
    """Exit status of the `glann train` of a job that has ended; 1 if it was killed before it had one.

    Ray keeps no exit status of a stopped job, so the job writes it in the last line of its log.
    """
    if job.state == "succeeded":
        return ExitStatus.OK
    if job.state == "failed" and job.exit_status is not None:
        return job.exit_status if job.exit_status > 0 else 128 - job.exit_status
    reported = [
        line.removeprefix(shipping.STATUS_LINE).strip()
        for line in client.get_job_logs(job.id).splitlines()
        if line.startswith(shipping.STATUS_LINE)
    ]
    status = int(reported[-1]) if reported and reported[-1].isdecimal() else ExitStatus.ENVIRONMENT
    return status or ExitStatus.ENVIRONMENT if job.state == "failed" else status


def outcome(job: Job, status: int) -> str:
    """One-line description of how a job ended, with the remedy."""
    if job.state == "succeeded":
        return "finished"
    again = "the same `glann submit` resumes it"
    if status == ExitStatus.STOPPED:
        return f"stopped and saved; {again}"
    if job.state == "stopped" and status == ExitStatus.OK:
        return "finished before it could be stopped"
    if job.state == "stopped" and status == 128 + signal.SIGTERM:
        return f"stopped before training started; {again}"
    if job.state == "stopped":
        return f"killed before it had saved; {again} from the last checkpoint"
    return f"failed with exit status {status}; see `glann jobs logs {job.name}`"


def stop(client: JobSubmissionClient, job: Job) -> None:
    """Request an active job to save and stop; Ray kills it after `checkpoint.timeout_s` and a margin."""
    client.stop_job(job.id)


def wait(client: JobSubmissionClient, job: Job) -> Job:
    """Wait until the job has ended; its final state."""
    while (now := refreshed(client, job)).active:
        time.sleep(POLL_S)
    return now
