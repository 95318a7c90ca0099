"""`glann train`: from a configuration to a finished run, the same command also after an interruption."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch

from ...cluster.checkpoints import retention
from ...cluster.checkpoints.lease import HeldLease, hold
from ...cluster.nodes.ray import ray_cluster
from ...config.run import Config
from ...datasets.assets.catalogue import load_weights
from ...datasets.index import Index
from ...errors import GlannError, UserError
from ...metrics.features.extractor import build_extractor
from ...reports.run_folder import CHECKPOINTS, JOURNAL, write_config
from ...storage.journal import entries
from ...storage.open import open_store
from ...tracking.runs import Status, TrackedRun
from ..objective import build_objective
from . import finish
from .folder import is_finished, refuse_other_configuration, require_checkpoint, take_back_tracking
from .hooks import ALONE, Event, Supervision
from .log import RunLog
from .mirror import RunMirror, take_back
from .preflight import open_data, sole_command
from .recovery import GOES_ON, RunStopped, run_workers

if TYPE_CHECKING:
    from rich.console import Console, Group


def train(config: Config, console: Console, supervision: Supervision = ALONE) -> Group:
    """Train both stages, or go on where an interrupted run stopped, and say what came out.

    Raises:
        UserError: something given is wrong; a run that had not begun leaves nothing behind.
        EnvironmentFault: workers, storage or a server failed for longer than the configured patience.
        RunStopped: SIGINT or SIGTERM, or `supervision` wanted it; saved.
    """
    fresh, ran = not config.run_dir.exists(), False
    try:
        if take_back(config):
            console.print(f"going on with the copy of the run folder beside {config.checkpoint_url}")
        refuse_other_configuration(config)
        take_back_tracking(config)
        if is_finished(config):
            if config.tracking.enabled and TrackedRun.waits(config.run_dir):
                console.print(f"{config.run_dir} is finished; sending MLflow what it has not taken yet")
                TrackedRun.open(config, config.run_dir).finish()
            else:
                console.print(f"{config.run_dir} is finished already; nothing to do")
            return finish.summary_of(config)
        require_checkpoint(config)
        index = open_data(config, console)
        build_objective(config, torch.device("cpu"))  # finds a wrong tap or file now and not at night
        build_extractor(config.evaluation.extractor, load_weights)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        store = open_store(config.checkpoint_url, config.s3)
        with sole_command(config.run_dir, "train"), hold(store, console.print) as lease:
            tags = {"glann.fingerprint": index.fingerprint, **supervision.tags}
            tracked = TrackedRun.open(config, config.run_dir, tags, parent_run_id=supervision.parent_run_id)
            ran = True
            run(config, index, tracked, console, lease, supervision)
    except UserError:
        if fresh and not (ran and has_begun(config)):
            shutil.rmtree(config.run_dir, ignore_errors=True)
        raise
    return finish.summary_of(config)


def has_begun(config: Config) -> bool:
    """Whether the run folder holds anything that would be missed: an epoch's numbers, or a checkpoint."""
    journal, saved = config.run_dir / JOURNAL, (config.run_dir / CHECKPOINTS).glob("step-*")
    return any(saved) or (journal.exists() and any("epoch" in entry for entry in entries(journal)))


def run(
    config: Config, index: Index, tracked: TrackedRun, console: Console, lease: HeldLease, supervision: Supervision
) -> None:
    """Train on the workers, then package, measure and report, telling MLflow how it ended."""
    status: Status = "FAILED"
    mirror = RunMirror(config)

    def on_event(event: Event) -> None:
        log(event)
        if event["kind"] == "checkpoint":
            mirror.send_soon()
        supervision.hear(event)

    try:
        write_config(config.run_dir, config)
        retention.remove_torn(open_store(config.checkpoint_url, config.s3))
        with ray_cluster(config), RunLog(config, tracked, console) as log:
            run_workers(config, on_event, lease, supervision)
        if why := supervision.stop():
            raise RunStopped(f"{why}: it is trained, and neither packaged nor measured; {GOES_ON}")
        finish.finish(config, index, tracked, console, log.timings())
        status = "FINISHED"
    except (RunStopped, KeyboardInterrupt):
        status = "KILLED"
        raise
    except GlannError:
        raise
    finally:
        tracked.finish(status)
        if has_begun(config):
            mirror.close(console.print)
