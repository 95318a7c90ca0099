"""`glann submit` and `glann jobs`: runs as jobs on a remote Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ExitStatus, GlannError
from .fetch import fetch
from .options import HERE, AddressOption, Overrides
from .table import print_table

if TYPE_CHECKING:
    from ..cluster.jobs.client import Job, JobSubmissionClient
    from ..config.run import Config
    from ..trainers.run.shared import Finished

jobs_app = typer.Typer(
    no_args_is_help=True, help="List submitted runs, watch them, read their logs, stop them, fetch results."
)
jobs_app.command()(fetch)

RunsOption = Annotated[
    str | None,
    typer.Option(
        "--runs", metavar="URL", help="the checkpoint.url of the runs: read it there without asking a cluster"
    ),
]
NameArg = Annotated[str, typer.Argument(metavar="NAME", help="name of the run, or of one attempt such as faces.2")]


def submit(
    config: Annotated[
        str, typer.Argument(metavar="RECIPE|STUDY", help="a recipe's name, or a YAML file of a recipe or study")
    ],
    overrides: Overrides = None,
    address: AddressOption = HERE,
    name: Annotated[
        str | None, typer.Option(help="name of the run, its checkpoints and the job; empty means the recipe's")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="follow the log and exit with the job's status; or return at once")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="variable to pass to the job; repeatable; of others only MLFLOW_TRACKING_URI is",
        ),
    ] = None,
) -> None:
    """Train on a remote Ray cluster: run `glann train`, or of a study `glann tune`, as a job there, with this machine's
    version of glann.

    \b
    glann submit celebahq-1024 data.url=s3://bucket/celebahq-1024 checkpoint.url=s3://bucket/runs
    glann submit my.yaml --name trial-3 --address http://10.0.0.5:8265 --wait
    glann submit my.yaml --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY
    glann submit my-study.yaml checkpoint.url=s3://bucket/runs budget.trials=50

    A name identifies one run: the same command resumes a run that was stopped or lost, follows one that is active, and
    says so at once where it has finished. `glann jobs fetch NAME` copies the results to this machine.
    Ctrl-C while waiting leaves the job running; `glann jobs stop NAME` saves and stops it. The cluster's token is read
    from ~/.ray/auth_token or RAY_AUTH_TOKEN. Relative paths of the job, such as runs_dir, are relative to ~/glann-jobs
    on the head node.
    """
    from ..cluster.jobs import client as jobs
    from ..cluster.jobs import shipping, versions
    from ..cluster.jobs.tracking import tracking_of

    resolved, study, finished = _load(config, [*(overrides or []), *([f"name={name}"] if name else [])])
    variables = shipping.environment(env or [])
    if _is_finished(resolved.name, finished):
        return
    with _connected(address) as client:
        last = jobs.last_attempt(client, resolved.name)
        if last is not None and last.active:
            jobs.refuse_fork(last, resolved, study)
            typer.echo(f"{last.id} is {last.state} already; nothing was started")
            job = last
        else:
            typer.echo(f"checking the versions on {address}")
            found = versions.refuse_misfit(client, address)
            typer.echo(f"compatible: {_summary(found.versions)}")
            tracking = tracking_of(resolved, variables, found.tracking)
            variables |= tracking.variables
            if tracking.server:
                typer.echo(f"MLflow: {tracking.server}")
            if tracking.warning:
                typer.echo(f"warning: {tracking.warning}", err=True)
            job = jobs.start(client, resolved, variables, last, study)
            resumed = f", which resumes {last.id} ({_state(last)})" if last else ""
            typer.echo(f"submitted {job.id}{resumed}")
        if hint := shipping.forgotten_keys(resolved, variables):
            typer.echo(f"note: {hint}", err=True)
        if not wait:
            typer.echo(f"watch: glann jobs watch {job.name}{_at(address)}")
            typer.echo(f"log: glann jobs logs {job.name} --follow{_at(address)}")
            typer.echo(f"stop: glann jobs stop {job.name}{_at(address)}")
            return
        _follow(client, job, address)
        ended = jobs.wait(client, job)
        status = jobs.exit_status(client, ended)
        typer.echo(f"{ended.id}: {jobs.outcome(ended, status)}", err=True)
    raise typer.Exit(status)


@jobs_app.command("list")
def list_jobs(address: AddressOption = HERE, runs: RunsOption = None) -> None:
    """List the submitted runs of a cluster, every attempt, the newest first; tab-separated if not on a terminal.

    \b
    glann jobs list
    glann jobs list --address http://10.0.0.5:8265
    glann jobs list --runs s3://bucket/runs         without the cluster
    """
    import time

    from ..cluster.jobs import client as jobs
    from .run_status import all_in, hint_at_runs, of_jobs

    if runs is not None:
        seen = all_in(runs)
        head: tuple[str, ...] = ("RUN", "STATE", "STARTED", "PROGRESS", "MLFLOW")
        rows: list[tuple[str, ...]] = [
            (one.status.name, one.status.state, _clock(one.status.began), one.line(time.time()), one.mlflow)
            for one in seen
            if one.status is not None
        ]
        print_table(head, rows, f"no runs have written their status to {runs} yet")
        return
    with hint_at_runs(), _connected(address) as client:
        found = jobs.list_jobs(client)
    newest = {job.name: job.id for job in sorted(found, key=lambda job: job.attempt)}
    last = [job for job in found if newest[job.name] == job.id]
    seen_by_id = dict(zip((job.id for job in last), of_jobs(last), strict=True))
    head = ("RUN", "ATTEMPT", "STATE", "STARTED", "TOOK", "CHECKPOINTS", "PROGRESS", "MLFLOW")
    rows = []
    for job in found:
        shown = seen_by_id.get(job.id)
        progress = (shown.line(time.time()), shown.mlflow) if shown else ("", "")
        rows.append((job.name, job.id, _state(job), _clock(job.started), _took(job), job.checkpoints, *progress))
    print_table(head, rows, f"no runs were submitted to {address} yet")


@jobs_app.command()
def status(name: NameArg, address: AddressOption = HERE, runs: RunsOption = None) -> None:
    """Show how a submitted run stands: its job, progress, time left, devices, last checkpoint and page in MLflow.

    \b
    glann jobs status celebahq-1024
    glann jobs status celebahq-1024 --runs s3://bucket/runs      without the cluster
    """
    from ..cluster.jobs import client as jobs
    from .run_status import described, hint_at_runs, of_job, of_name

    if runs is not None:
        seen = of_name(runs, name)
        _print_pairs({"run": name} | described(seen))
        return
    with hint_at_runs(), _connected(address) as client:
        job = jobs.find(client, name)
        if job.active:
            how = job.state + (f": {job.message}" if job.state == "pending" else "")
        else:
            how = jobs.outcome(job, jobs.exit_status(client, job))
    shown = {
        "run": job.name,
        "attempt": job.id,
        "state": how,
        "started": _clock(job.started),
        "took": _took(job),
        **described(of_job(job)),
        "checkpoints": job.checkpoints,
        "environment": ", ".join(job.variables) or "no variables were passed",
    }
    _print_pairs(shown)


@jobs_app.command()
def watch(name: NameArg, address: AddressOption = HERE, runs: RunsOption = None) -> None:
    """Show the progress bar of a submitted run until it ends, and exit with its status; a line a minute in a log file.

    \b
    glann jobs watch celebahq-1024
    glann jobs watch celebahq-1024 --runs s3://bucket/runs       without the cluster

    Ctrl-C leaves the job running. The exit status is 1 if the run ended without a word.
    """
    from ..cluster.jobs import client as jobs
    from .run_status import hint_at_runs
    from .watch import watch_folder, watch_job

    try:
        if runs is not None:
            ended = watch_folder(runs, name)
        else:
            with hint_at_runs(), _connected(address) as client:
                ended = watch_job(client, jobs.find(client, name), address)
    except KeyboardInterrupt:
        typer.echo(f"\n{name} is not affected; watch again: glann jobs watch {name}{_at(address)}", err=True)
        raise typer.Exit(ExitStatus.INTERRUPTED) from None
    raise typer.Exit(ended)


@jobs_app.command()
def logs(
    name: NameArg,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="follow until the job ends; Ctrl-C leaves it running")
    ] = False,
    address: AddressOption = HERE,
) -> None:
    """Print the log of a submitted run.

    \b
    glann jobs logs celebahq-1024 --follow
    glann jobs logs celebahq-1024.1          the log of its first attempt
    """
    from ..cluster.jobs import client as jobs

    with _connected(address) as client:
        job = jobs.find(client, name)
        if follow:
            _follow(client, job, address)
        else:
            typer.echo(client.get_job_logs(job.id), nl=False)


@jobs_app.command()
def stop(
    name: NameArg,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="wait until it has saved; or return at once")] = True,
    address: AddressOption = HERE,
) -> None:
    """Save and stop a submitted run; the same `glann submit` resumes it.

    \b
    glann jobs stop celebahq-1024

    The job has `checkpoint.timeout_s` and a minute to save before Ray kills it. The exit status is 1 if it ended
    without saving.
    """
    from ..cluster.jobs import client as jobs

    with _connected(address) as client:
        job = jobs.find(client, name)
        if job.active:
            jobs.stop(client, job)
            if not wait:
                typer.echo(f"{job.id}: requested to save and stop; see glann jobs status {job.name}")
                return
            typer.echo(f"{job.id}: requested to save and stop; waiting (Ctrl-C does not cancel the request)")
            job = jobs.wait(client, job)
        else:
            typer.echo(f"{job.id} has ended already")
        status = jobs.exit_status(client, job)
        typer.echo(f"{job.id}: {jobs.outcome(job, status)}")
    if job.state == "stopped" and status not in (ExitStatus.OK, ExitStatus.STOPPED):
        raise typer.Exit(ExitStatus.ENVIRONMENT)


def _print_pairs(shown: dict[str, str]) -> None:
    for key, value in shown.items():
        typer.echo(f"{key:12} {value}")


def _load(file: str, given: list[str]) -> tuple[Config, str, Callable[[], Finished | None]]:
    """The configuration of a run, or of the base of a study; the study's YAML; and a look whether it has finished."""
    from functools import partial

    from ..cluster.jobs import shipping
    from ..trainers.run import shared
    from ..tuning.load import is_study_file, load_study

    if is_study_file(file):
        from ..tuning import shared as shared_studies

        study = shared_studies.for_cluster(load_study(file, overrides=given))
        return shipping.for_cluster(study.base()), study.to_yaml(), partial(shared_studies.finished, study)
    from ..trainers.plan.own_images import load_recipe

    config = shipping.for_cluster(load_recipe(file, given, here=False))
    return config, "", partial(shared.finished, config)


def _is_finished(name: str, finished: Callable[[], Finished | None]) -> bool:
    """Print where the results are if shared storage holds all of them, and MLflow too; False if there is work left.

    Raises:
        UserError: the name belongs to another run.
    """
    from ..trainers.run import shared

    try:
        found = finished()
    except shared.OtherRun:
        raise
    except GlannError as error:  # such as no keys on this machine: nodes may have a role
        typer.echo(f"note: whether {name} has finished is left to the job: {error}", err=True)
        return False
    if found is not None and found.owed:
        typer.echo(f"{name} has finished; a job sends MLflow the outstanding entries")
    if found is None or found.owed:
        return False
    typer.echo(f"{name} has finished; nothing was started")
    for line in found.lines():
        typer.echo(line)
    return True


@contextmanager
def _connected(address: str) -> Iterator[JobSubmissionClient]:
    from ..cluster.jobs.client import connect, one_line_errors

    client = connect(address)
    with one_line_errors(address):
        yield client


def _follow(client: JobSubmissionClient, job: Job, address: str) -> None:
    """Print the log until the job ends; Ctrl-C stops the printing, not the job."""
    from ..cluster.jobs import client as jobs

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        jobs.follow(client, job, show)
    except KeyboardInterrupt:
        typer.echo(
            f"\n{job.id} is still running; log: glann jobs logs {job.name} --follow{_at(address)}; "
            f"stop: glann jobs stop {job.name}{_at(address)}",
            err=True,
        )
        raise typer.Exit(ExitStatus.INTERRUPTED) from None


def _at(address: str) -> str:
    import os
    import shlex

    return "" if address == os.environ.get("RAY_API_SERVER_ADDRESS", HERE) else f" --address {shlex.quote(address)}"


def _summary(found: dict[str, dict[str, str | None]]) -> str:
    """The number of nodes, and their versions of the main packages."""
    shown = ("python", "ray", "torch", "deepspeed")
    kinds = sorted({", ".join(f"{name} {versions[name]}" for name in shown) for versions in found.values()})
    return f"{len(found)} node{'s' if len(found) > 1 else ''} with {' or '.join(kinds)}"


def _state(job: Job) -> str:
    failed = job.state == "failed" and job.exit_status is not None
    return f"failed, exit status {job.exit_status}" if failed else job.state


def _clock(seconds: float | None) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"


def _took(job: Job) -> str:
    import time

    if job.started is None:
        return "-"
    seconds = int((job.ended or time.time()) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
