"""Driver of `glann train`: trains or resumes a run on workers that also measure it, then packages and reports it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from ...cluster.checkpoints import retention
from ...cluster.checkpoints.best import Best, named_best
from ...cluster.checkpoints.layout import DamagedCheckpoint, survey
from ...cluster.checkpoints.lease import HeldLease, hold, require
from ...cluster.latent_rates import latent_lr
from ...cluster.nodes.ray import ray_cluster, require_ray
from ...config.run import Config, require_trainable
from ...datasets.fit import require_fit
from ...datasets.index import Index
from ...errors import EnvironmentFault, GlannError
from ...metrics.features.extractor import build_extractor
from ...metrics.spec import best_metric
from ...reports.run_folder import JOURNAL
from ...storage.base import Store
from ...storage.journal import entries
from ...storage.open import open_store
from ...tracking.runs import DataInput, TrackedRun
from ...tracking.tensorboard import require_tensorboard
from ..objective import Objective
from ..plan.remaining import Remaining, Work
from . import finish, stage_one
from .evaluation import Evaluated
from .events import CheckpointStarted, Event
from .folder import is_finished, refuse_other_configuration, require_checkpoint, take_back_tracking
from .hooks import NO_HOOKS, Hooks
from .lifecycle import open_run
from .log import RunLog
from .mirror import RunMirror, take_back
from .preflight import is_worked_on, open_data
from .recovery import MEASURES, RESUMES, RunStopped, run_workers
from .status_file import StatusFile, status_file
from .telemetry import Telemetry

if TYPE_CHECKING:
    from rich.console import Console, Group


def train(config: Config, console: Console, hooks: Hooks = NO_HOOKS) -> Group:
    """Train every stage, or resume an interrupted run; returns a summary of the result.

    Raises:
        UserError: invalid input.
        EnvironmentFault: workers, storage or a server failed for longer than the configured patience.
        RunStopped: SIGINT or SIGTERM, or `hooks.stop` returned a reason; what was trained is saved.

    Whatever is raised, a folder that is new stays only if the run began here and there is an epoch or a checkpoint of
    it: the checkpoints may be those of a command elsewhere, which was not to be disturbed.
    """
    fresh, opened = not config.run_dir.exists(), False
    try:
        if take_back(config):
            console.print(f"resuming with the copy of the run folder beside {config.checkpoint_url}")
        refuse_other_configuration(config)
        take_back_tracking(config)
        if is_finished(config):
            if config.tracking.enabled and TrackedRun.waits(config.run_dir):
                console.print(f"{config.name} is finished; sending MLflow the outstanding entries")
                TrackedRun.open(config, config.run_dir).finish()
            else:
                console.print(f"{config.name} is finished already; nothing to do")
            RunMirror(config).complete(console.print)
            return finish.summary_of(config)
        require_checkpoint(config)
        require_trainable(config)
        require_ray(config)
        if config.tracking.tensorboard:
            require_tensorboard()
        if config.stage_one is not None:
            stage_one.require_same_stage_one(config)
        index = open_data(config, console)
        Objective(config, torch.device("cpu"))  # find invalid taps or files before training starts
        build_extractor(config.evaluation.extractor)
        best_metric(config.evaluation.extractor, config.evaluation.best)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        store, mirror = open_store(config.checkpoint_url, config.s3), RunMirror(config)
        rows = require_fit(index, config.data, config.cluster.max_workers)
        tags = {"glann.fingerprint": index.fingerprint}
        if config.trainer == "glo":
            tags["glann.latent_lr"] = f"{latent_lr(config.glo, rows):.6g}"
        tags |= hooks.tags
        data = DataInput(config.data.url, index.fingerprint, rows, index.resolution, index.channels)
        try:
            with (
                hold(store, console.print) as lease,
                open_run(config, config.run_dir, "train", tags, hooks.parent_run_id, data) as tracked,
            ):
                opened = True
                remaining = Remaining(config, Work.of(config, index, rows))
                telemetry = Telemetry(config, remaining, tracked.address, best=known_best(store))
                with status_file(config, telemetry) as status:
                    run(config, index, tracked, console, lease, mirror, hooks, telemetry, status)
        finally:
            if opened and has_begun(config):
                mirror.close(console.print)
    except BaseException:
        if fresh and not (opened and has_begun(config)):
            remove_folder(config)
        raise
    return finish.summary_of(config)


def known_best(store: Store) -> Best | None:
    """The best checkpoint of earlier starts; None also where best.json is damaged, which the workers report."""
    with suppress(DamagedCheckpoint):
        return named_best(store)
    return None


def remove_folder(config: Config) -> None:
    """Remove the folder of a run that got no results here, so that it does not keep its name for its configuration."""
    if config.run_dir.exists() and not is_worked_on(config.run_dir):
        shutil.rmtree(config.run_dir, ignore_errors=True)


def has_begun(config: Config) -> bool:
    """Whether there are results worth keeping: the numbers of an epoch, or a checkpoint. True if that is unknown."""
    journal = config.run_dir / JOURNAL
    if journal.exists() and any("epoch" in entry for entry in entries(journal)):
        return True
    try:
        found = survey(open_store(config.checkpoint_url, config.s3))
    except GlannError:
        return True
    return bool(found.good or found.damaged)


def run(
    config: Config,
    index: Index,
    tracked: TrackedRun,
    console: Console,
    lease: HeldLease,
    mirror: RunMirror,
    hooks: Hooks,
    telemetry: Telemetry,
    status: StatusFile,
) -> None:
    """Train and measure on the workers, then package and report."""
    evaluated: Evaluated | None = None

    def on_event(event: Event) -> None:
        nonlocal evaluated
        telemetry(event)
        status(event)
        log(event)
        if isinstance(event, Evaluated):
            evaluated = event
        if isinstance(event, CheckpointStarted):
            mirror.send_soon()
        hooks.notify(event)

    store = open_store(config.checkpoint_url, config.s3)
    retention.remove_torn(store)
    if config.stage_one is not None and retention.latest(store) is None:
        console.print(f"starting from the codes and the generator of {config.stage_one}")
        stage_one.start_from(config, index, store, lambda: require(store, lease.ticket))
    with ray_cluster(config), RunLog(config, tracked, console, telemetry) as log:
        run_workers(config, on_event, lease, hooks)
    if why := hooks.stop():
        raise RunStopped(f"{why}: the run is trained, but not packaged; {RESUMES}")
    if evaluated is None:
        raise EnvironmentFault(f"the results of the evaluation were lost on their way; {MEASURES}")
    finish.finish(config, index, tracked, log.timings(), evaluated)
