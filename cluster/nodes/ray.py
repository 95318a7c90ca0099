"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...config.run import Config
from ...config.sections import ClusterConfig
from ...errors import EnvironmentFault, UserError, one_line, redact

# Read by Ray where the driver runs and by what it starts; whoever sets one himself keeps his own.
KNOBS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # between looks at the workers
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "180",  # of a worker that is there and does not answer
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # there was room a moment ago; after this the driver looks again
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver watches, and asks for a checkpoint in time
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A node that is cut off is given up after (5 + 1) s x 3; the defaults take a minute. For a cluster that is
    # joined these belong to the environment of `ray start --head`.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def ray_cluster(config: Config) -> Iterator[None]:
    """Join the configured Ray cluster, or start one on this machine and end it afterwards.

    Raises:
        EnvironmentFault: the cluster does not answer. UserError: it can never hold the workers.
    """
    turn_knobs()
    # a worker that runs out of a stopped driver's sight must not print over the progress bar
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address in (None, "local"):
        address = None
        protect_local_ray()
    import ray

    hide_passwords()
    joined = ray.is_initialized()
    if not joined:
        local: dict[str, Any] = {}
        if address is None:
            cpus = math.ceil(config.cluster.max_workers * config.cluster.cpus_per_worker)
            local = {"num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # a node that is slow to start is a plain Exception of Ray's
            raise no_ray(address, error) from error
    if not joined:
        quiet_raylet()
    try:
        refuse_too_few_gpus(config, ray.cluster_resources())
        yield
    finally:
        if not joined:
            ray.shutdown()


def no_ray(address: str | None, error: Exception) -> EnvironmentFault:
    """What to say where Ray cannot be joined, or started (no address)."""
    reason = one_line(error)
    if address is None:
        return EnvironmentFault(f"Ray did not start on this machine: {reason}; run the same command again")
    return EnvironmentFault(
        f"no Ray cluster at {address}: {reason}; check cluster.address, RAY_ADDRESS and RAY_AUTH_MODE"
    )


def turn_knobs() -> None:
    for name, value in KNOBS.items():
        os.environ.setdefault(name, value)


def protect_local_ray() -> None:
    """Give the local Ray about to be started a token of its own, unless the environment says otherwise.

    Whatever address it is given, a local Ray listens on every interface, and who reaches it may run code.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def hide_passwords() -> None:
    """Take passwords in addresses out of this process's command line, which `ps` shows and Ray lists with its jobs."""
    given = " ".join(sys.orig_argv)
    if redact(given) != given:
        from ray._raylet import setproctitle  # type: ignore[attr-defined]

        setproctitle(redact(given))


def quiet_raylet() -> None:
    """A lost worker is told in one line by the driver, not also in ten by Ray, which has no switch for it (2.60)."""
    from ray._private import worker

    tell = worker.print_to_stdstream

    def filtered(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        if not any(line.startswith("A worker died or was killed") for line in data.get("lines", ())):
            tell(data, *arguments, **options)

    worker.print_to_stdstream = filtered


def refuse_too_few_gpus(config: Config, resources: dict[str, float]) -> None:
    """A machine without accelerators would wait for them for ever."""
    if config.cluster.gpus_per_worker and not resources.get("GPU") and not config.cluster.address:
        raise UserError(
            f"cluster.gpus_per_worker={config.cluster.gpus_per_worker:g} but this machine has no GPU; join a cluster "
            "with cluster.address=..., or set cluster.gpus_per_worker=0"
        )


def resources_of(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker takes of its node."""
    resources = {"CPU": cluster.cpus_per_worker}
    return resources | {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else resources
