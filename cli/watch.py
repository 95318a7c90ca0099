"""`glann jobs watch`: the bar of a run, from anywhere, until its job ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from ..cluster.jobs import client as jobs
from ..errors import EnvironmentFault, ExitStatus
from ..reports.status import Status, duration
from ..reports.status_bar import StatusBar, draws_bars
from .run_status import Seen, of_job, of_name

if TYPE_CHECKING:
    from ..cluster.jobs.client import Job, JobSubmissionClient

POLL_S, LINE_EVERY_S = 5.0, 60.0
PATIENCE = 6  # polls in a row without an answer


def watch_job(client: JobSubmissionClient, job: Job, address: str) -> int:
    """Watch a run by its job; the exit status of the job.

    Raises:
        EnvironmentFault: the cluster does not answer any more.
    """
    ended = job

    def poll() -> Seen | None:
        nonlocal ended
        with jobs.one_line_errors(address):
            ended = jobs.refreshed(client, job)
        if not ended.active:
            return None
        return of_job(ended) if ended.state == "running" else Seen(why=f"{ended.state}: {ended.message}")

    show_until_none(poll)
    status = jobs.exit_status(client, ended)
    print(f"{ended.id}: {jobs.outcome(ended, status)}", flush=True)
    return status


def watch_folder(runs: str, name: str) -> int:
    """Watch a run by what lies beside its checkpoints; its exit status.

    Raises:
        UserError: there is no such run. EnvironmentFault: it is silent for too long, or the store does not answer.
    """
    last: Status | None = None

    def poll() -> Seen | None:
        nonlocal last
        seen = of_name(runs, name)
        last = seen.status
        return None if last is not None and last.ended else seen

    def check(seen: Seen) -> None:
        now = time.time()
        if seen.status is not None and seen.status.is_stale(now):
            age, host = duration(now - seen.status.updated), seen.status.host
            raise EnvironmentFault(
                f"{name}: no sign of life for {age}: the driver on {host} has died, or cannot write to {runs}"
            )

    show_until_none(poll, check)
    if last is None or last.exit_status is None:
        return ExitStatus.ENVIRONMENT
    print(f"{name}: " + ": ".join(word for word in (last.state, last.message) if word), flush=True)
    return last.exit_status


def show_until_none(poll: Callable[[], Seen | None], check: Callable[[Seen], None] = lambda seen: None) -> None:
    """Draw what `poll` returns, or print a line a minute without a terminal, until it returns None.

    Raises:
        EnvironmentFault: several polls in a row have failed.
    """
    console, failures, printed = Console(), 0, -LINE_EVERY_S
    with StatusBar(console) as bar:
        while True:
            try:
                seen = poll()
            except EnvironmentFault:
                failures += 1
                if failures >= PATIENCE:
                    raise
                time.sleep(POLL_S)
                continue
            failures = 0
            if seen is None:
                return
            check(seen)
            if seen.status is not None and not seen.former:
                bar.show(seen.status, seen.line(time.time()) if seen.status.is_stale(time.time()) else "")
            else:
                bar.note(seen.why or "starting")
            if not draws_bars(console) and time.monotonic() - printed >= LINE_EVERY_S:
                printed = time.monotonic()
                console.print(seen.line(time.time()), soft_wrap=True, highlight=False, markup=False)
            time.sleep(POLL_S)
