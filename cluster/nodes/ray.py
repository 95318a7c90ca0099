"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...config.run import Config
from ...config.sections import ClusterConfig
from ...errors import EnvironmentFault, UserError, one_line, redact
from .address import ray_address, require_head
from .ray_private import hide_worker_output, isolated_job, session_folder, set_process_title
from .threads import let_threads_sleep

# Read by Ray in the driver and in the processes that it starts. A variable that is set already is kept.
RAY_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # between checks of the workers
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "180",  # for a living worker that does not answer
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # the reservation was ready a moment before; the driver retries
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver has its own, which requests a checkpoint first
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # keep CUDA_VISIBLE_DEVICES as it is where workers take no GPU
    # An unreachable node is declared dead after (5 + 1) s x 3; with the defaults, after a minute. For a cluster that
    # is joined, these belong in the environment of `ray start --head`.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def ray_cluster(config: Config) -> Iterator[None]:
    """Join the configured Ray cluster, or start one on this machine and shut it down afterwards.

    Raises:
        EnvironmentFault: the cluster does not answer, or a local Ray does not start.
        UserError: the address is none, or there can never be capacity for the workers.
    """
    hide_working_folder()
    require_ray(config)
    import ray

    hide_passwords()
    address, joined = ray_address(config), ray.is_initialized()
    if not joined:
        options: dict[str, Any] = {}
        if address is None:
            cpus = math.ceil(config.cluster.max_workers * config.cluster.cpus_per_worker)
            options = {"num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
        elif address != "auto":
            # Ray Train's cleaner asks for "the" cluster of its machine, and stays for ever where there are two
            options = {"runtime_env": {"env_vars": {"RAY_ADDRESS": address}}}
        try:
            ray.init(
                address=address or "local",
                job_config=isolated_job(),
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        except Exception as error:  # Ray raises a plain Exception for a node that is slow to start
            raise no_ray(address, error) from error
    if not joined:
        quiet_raylet()
    try:
        refuse_too_few_gpus(config, ray.cluster_resources())
        yield
    finally:
        if not joined:
            ray.shutdown()


def require_ray(config: Config) -> None:
    """Refuse a cluster that cannot be joined, and a local Ray that could not start; nothing is started here.

    Raises:
        UserError, EnvironmentFault: see `require_home`, `require_head` and `require_session_folder`.
    """
    require_home()
    address = ray_address(config)
    set_ray_env()
    if address is None:
        protect_local_ray()
    import ray  # it reads these variables when it is imported, and not again

    if ray.is_initialized():
        return
    if address is not None:
        require_head(address)
    else:
        require_session_folder()


def require_home() -> None:
    """Refuse a user without a home folder, which Ray Train looks up when it is imported.

    Raises:
        UserError: HOME is not set, and /etc/passwd does not know the user, as in a container that runs as a number.
    """
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError(
            f"Ray needs a home folder: HOME is not set, and user {os.getuid()} is not in /etc/passwd; "
            "`export HOME=` and a folder that can be written"
        ) from error


def require_session_folder() -> None:
    """Refuse a folder for the files of a local Ray that cannot hold its sockets; batch systems set a long TMPDIR.

    Raises:
        EnvironmentFault: its path is relative, or too long for a socket.
    """
    folder, too_long = session_folder()
    given = next((f"{name}={os.environ[name]}" for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), str(folder))
    remedy = "`export RAY_TMPDIR=/tmp`, or another folder of this machine with a short absolute path"
    if not folder.is_absolute():
        raise EnvironmentFault(f"Ray cannot put its files into {given}: that is no absolute path; {remedy}")
    if too_long:
        raise EnvironmentFault(f"Ray cannot put its sockets into {given}: {too_long} characters too many; {remedy}")


def no_ray(address: str | None, error: Exception) -> EnvironmentFault:
    """The error for a Ray that cannot be joined, or not started (`address` is None)."""
    reason = one_line(error)
    if address is None:
        folder, _ = session_folder()
        return EnvironmentFault(
            f"Ray did not start on this machine: {reason}; where the machine is busy or short of memory, try again "
            f"when it is not; otherwise see the logs in {folder}/session_latest/logs"
        )
    return EnvironmentFault(
        f"no Ray cluster at {address}: {reason}; check cluster.address, RAY_ADDRESS and RAY_AUTH_MODE"
    )


def set_ray_env() -> None:
    """Set the variables of `RAY_ENV` that the environment does not set, and those of threads."""
    let_threads_sleep()
    for name, value in RAY_ENV.items():
        os.environ.setdefault(name, value)


def hide_working_folder() -> None:
    """Drop empty entries of PYTHONPATH, as `$PYTHONPATH:/more` leaves them: to Python they are the working folder."""
    if given := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, given.split(os.pathsep)))


def protect_local_ray() -> None:
    """Generate a token for the local Ray about to be started, unless the environment sets RAY_AUTH_MODE.

    A local Ray listens on every interface, whatever address it gets, and runs any code that is sent to it.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def hide_passwords() -> None:
    """Remove passwords in addresses from this process's command line, which `ps` shows and Ray lists with its jobs."""
    given = " ".join(sys.orig_argv)
    if redact(given) != given:
        set_process_title(redact(given))


def quiet_raylet() -> None:
    """Hide what Ray says about processes at length, for which it has no option (2.60).

    Ten lines about a lost worker, which the driver reports in one; and a warning of many processes that start at once,
    as the trials of a study and the actors of their codes do.
    """
    hide_worker_output(is_noise)


def is_noise(line: str) -> bool:
    """Whether a line of Ray's is one of those that `quiet_raylet` hides."""
    return line.startswith("A worker died or was killed") or "worker processes have been started on node" in line


def refuse_too_few_gpus(config: Config, resources: dict[str, float]) -> None:
    """Raise UserError where workers need a GPU and this machine has none; the run would wait for ever."""
    if config.cluster.gpus_per_worker and not resources.get("GPU") and ray_address(config) is None:
        raise UserError(
            f"cluster.gpus_per_worker={config.cluster.gpus_per_worker:g} but this machine has no GPU; join a cluster "
            "with cluster.address=..., or set cluster.gpus_per_worker=0"
        )


def resources_of(cluster: ClusterConfig) -> dict[str, float]:
    """The resources that one worker takes."""
    resources = {"CPU": cluster.cpus_per_worker}
    return resources | {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else resources
