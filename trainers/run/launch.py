"""Launch of one group of workers on the Ray cluster."""

from __future__ import annotations

import math
import warnings
from typing import Any

from ...cluster.checkpoints.lease import Ticket
from ...cluster.nodes.ray import resources_of, set_ray_env
from ...cluster.nodes.threads import WAIT_POLICY, let_threads_sleep
from ...config.run import Config, redacted_config
from ...reports.run_folder import RAY
from .mailbox import STOPPED


def fit_workers(config: Config, workers: int, mailbox: Any, group: int, lease: Ticket) -> bool:
    """Start a group of workers and wait until it ends; True if it was stopped before the run was done.

    Raises:
        ray.train.TrainingFailedError: a worker was lost, or raised an error. Nothing is retried here.
    """
    import ray.train.torch

    from .worker import train_worker

    set_ray_env()  # the caller may have connected to Ray itself
    # redacted: Ray shows it on its dashboard, and workers do not use the tracking server
    task = redacted_config(config.with_absolute_paths()).model_dump(mode="json")
    cluster = config.cluster
    train: Any = ray.train  # its published types are those of an older version
    trainer = train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"config": task, "mailbox": mailbox, "group": group, "lease": lease},
        torch_config=train.torch.TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=math.ceil(cluster.peer_timeout_s)
        ),
        scaling_config=train.ScalingConfig(
            num_workers=workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources_of(cluster)
        ),
        run_config=train.RunConfig(
            name=f"workers-{group}",
            storage_path=str((config.run_dir / RAY).absolute()),
            # Ray's workers on other nodes have the environment of their node
            worker_runtime_env={"env_vars": {WAIT_POLICY: let_threads_sleep()}},
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's notes to its own developers
        return trainer.fit().return_value == STOPPED
