"""From the driver to the workers: the Ray cluster, the worker group, and the events that come back."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ..config import Config
from ..errors import EnvironmentFault, GlannError, UserError, redact
from ..tracking.connection import redacted_config
from .mailbox import Mailbox

POLL_S = 0.2


class RunStopped(GlannError):
    """The run was asked to stop, has been saved, and can go on."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again later


@contextmanager
def ray_cluster(config: Config) -> Iterator[None]:
    """Join the configured Ray cluster, or start one on this machine and end it afterwards.

    Raises:
        EnvironmentFault: the cluster does not answer. UserError: it can never hold the workers.
    """
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
            cpus = math.ceil(config.cluster.workers * config.cluster.cpus_per_worker)
            local = {"num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            reason = " ".join(str(error).split())[:200]
            raise EnvironmentFault(
                f"no Ray cluster at {address}: {reason}; check cluster.address, RAY_ADDRESS and RAY_AUTH_MODE"
            ) from error
    try:
        refuse_too_few_gpus(config, ray.cluster_resources())
        yield
    finally:
        if not joined:
            ray.shutdown()


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
        from ray._raylet import setproctitle

        setproctitle(redact(given))


def refuse_too_few_gpus(config: Config, resources: dict[str, float]) -> None:
    """A machine without accelerators would wait for them for ever."""
    if config.cluster.gpus_per_worker and not resources.get("GPU") and not config.cluster.address:
        raise UserError(
            f"cluster.gpus_per_worker={config.cluster.gpus_per_worker:g} but this machine has no GPU; join a cluster "
            "with cluster.address=..., or set cluster.gpus_per_worker=0"
        )


def run_workers(config: Config, on_event: Callable[[dict[str, Any]], None]) -> None:
    """Train on the workers until the run is done, handing every event to `on_event`.

    Raises:
        UserError, or a bug's own error: a worker met what trying again does not help.
        EnvironmentFault: workers were lost more often than `cluster.max_failures` allows.
        RunStopped: after SIGINT or SIGTERM, saved.
    """
    import ray

    mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    outcome = {"stopped": False}

    def hand_over() -> None:
        for event in ray.get(mailbox.drain.remote()):
            if event["kind"] == "fatal":
                raise event["error"]
            outcome["stopped"] |= event["kind"] == "stopped"
            on_event(event)

    with ThreadPoolExecutor(1, "ray-train") as pool, stop_on_signal(lambda: mailbox.stop.remote(), on_event):
        fit: Future[Any] = pool.submit(fit_workers, config, mailbox)
        try:
            while not fit.done():
                hand_over()
                wait_for(fit)
            hand_over()
        except BaseException:
            ray.shutdown()  # ends the workers, and with them the thread that waits for them
            raise
    if error := fit.exception():
        raise EnvironmentFault(
            f"the workers failed more than cluster.max_failures={config.cluster.max_failures} times, last with: "
            f"{last_line(error)}; the same command goes on from the last checkpoint"
        ) from error
    if outcome["stopped"]:
        raise RunStopped("the run was stopped and is saved; the same command goes on with it")


def fit_workers(config: Config, mailbox: Any) -> Any:
    """Start the worker group and wait for its end; Ray Train restarts it when a worker or node is lost."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from .worker import train_worker

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.cluster.start_timeout_s))
    # Ray shows it on its dashboard; workers talk to no tracking server
    task = redacted_config(config.with_absolute_paths()).model_dump(mode="json")
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": task, "mailbox": mailbox},
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="workers",
            storage_path=str((config.run_dir / "ray").absolute()),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's notes to its own developers
        return trainer.fit()


def wait_for(future: Future[Any]) -> None:
    """Sleep for a poll, or until the future is done."""
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    done.wait(POLL_S)


@contextmanager
def stop_on_signal(stop: Callable[[], Any], on_event: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM saves and stops the run, the second ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def handle(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        on_event({"kind": "stopping"})
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_line(error: BaseException) -> str:
    """The line of a remote traceback that names the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
