"""Runs command lines of glann, each in a process forked from one that has imported everything: milliseconds a command.

    python command_zygote.py < requests > answers        one JSON object a line; `CommandZygote` is the client

What trains, waits or reaches out is bounded: see `bound`. Everything else is the command as a user runs it.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LIMIT_S = 60.0  # of a command, which takes a second or two; a busy machine is no hang
STOPPED = "the sweep stops before Ray, and before servers"
MODULES = (
    *(
        "cli.main",
        "tracking.source",
        "trainers.run.driver",
        "tuning.driver",
        "tuning.forecast",
        "cluster.doctor.checks",
        "tracking.server",
    ),
    *("tuning.report.study", "trainers.plan.estimate", "cluster.jobs.client", "datasets.pack", "datasets.verify"),
    *("metrics.evaluate", "tracking.registry.registration", "tracking.registry.promote", "storage.s3", "reports.run"),
)
OTHER_MODULES = ("mlflow.artifacts", "ray.job_submission", "optuna", "rich.console", "rich.progress")


@dataclass(frozen=True)
class Outcome:
    """How a command ended. The status is negative for a signal, and None if it hung and was killed."""

    status: int | None
    out: str
    err: str
    seconds: float


class CommandZygote:
    """Client of one process that forks a process for each command.

    Args:
        user: numeric id to run as where this process is root and may make user namespaces, so that permissions count.
    """

    def __init__(self, env: Mapping[str, str], user: int | None = None) -> None:
        become = ["unshare", "--user", f"--map-user={user}", f"--map-group={user}"] if user else []
        self._process = subprocess.Popen(
            [*become, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(env)
        )

    def run(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], **how: Any) -> Outcome:
        """Run `glann ARGUMENTS` in a folder with exactly this environment. `how`: `umask`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), **how}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def can_change_user() -> bool:
    """Whether commands can be run as another user than root."""
    if os.getuid():
        return False
    done = subprocess.run(["unshare", "--user", "--map-user=12345", "--map-group=12345", "true"], capture_output=True)
    return done.returncode == 0


def bound() -> None:
    """Stop before Ray and servers, fetch no assets, try S3 once: these take minutes, do not end, or are not here."""
    from glann.config.sections import S3Config
    from glann.datasets.assets import catalogue
    from glann.errors import EnvironmentFault
    from glann.tracking import server
    from glann.trainers.run import driver
    from glann.tuning import driver as tuning
    from glann.tuning.compare import driver as comparing

    def stop(*_: Any, **__: Any) -> NoReturn:
        raise EnvironmentFault(STOPPED)

    def no_asset(name: str, *_: Any) -> NoReturn:
        raise EnvironmentFault(f"the sweep fetches no assets, so not {name}")

    driver.ray_cluster = tuning.ray_cluster = comparing.ray_cluster = stop  # type: ignore[assignment]
    server.running = stop  # type: ignore[assignment]
    driver.build_extractor = tuning.build_extractor = lambda name: None  # type: ignore[assignment]
    catalogue._obtain = no_asset  # type: ignore[assignment]
    S3Config.model_fields["max_attempts"].default = 1
    S3Config.model_rebuild(force=True)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes there
    for name in (*(f"glann.{name}" for name in MODULES), *OTHER_MODULES):
        importlib.import_module(name)
    bound()
    for line in sys.stdin:
        answers.write(json.dumps(vars(_run(json.loads(line)))) + "\n")
        answers.flush()


def _run(request: dict[str, Any]) -> Outcome:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        child = os.fork()
        if not child:
            _become(request, out.fileno(), err.fileno())
        descriptor = os.pidfd_open(child)
        hung = not select.select([descriptor], [], [], LIMIT_S)[0]
        os.close(descriptor)
        if hung:
            os.killpg(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.monotonic() - began
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        return Outcome(None if hung else status, *texts, seconds)


def _become(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Be the command: in the child."""
    status = 99  # of a fault of this file
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
        os.environ.clear()
        os.environ.update(request["env"])
        time.tzset()
        tempfile.tempdir = None
        os.chdir(request["cwd"])
        if "umask" in request:
            os.umask(request["umask"])
        sys.argv = sys.orig_argv = ["glann", *request["arguments"]]
        from glann.cli.main import main

        try:
            main()
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            status = 1
            import traceback

            traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


if __name__ == "__main__":
    _serve()
