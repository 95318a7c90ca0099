"""Runs the trials of a study with Ray Tune: placement, shared context and parallelism."""

from __future__ import annotations

import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from ..cluster.nodes.capacity import cluster_nodes, node_resources, places_on
from ..cluster.nodes.ray import resources_of
from ..config.run import Config
from ..config.sections import ClusterConfig
from ..errors import UserError
from ..inference.package import open_model
from ..metrics.evaluate import evaluate
from ..metrics.result import by_key
from ..reports.run_folder import RAY, read_config
from ..tracking.address import absolute_uri, default_uri
from ..tracking.runs import TrackedRun
from ..trainers.run.driver import train
from ..trainers.run.folder import require_summary
from ..trainers.run.hooks import Hooks
from ..trainers.run.local import load_stage_one, train_second_stage
from .board import Board
from .budget import Budget
from .ledger import BASELINE, Ledger
from .scheduler import build_scheduler
from .search import LedgerSearch, Members, member
from .study import StudyConfig
from .trial import Metrics, TrainAndMeasure, TrialContext, TrialRun

if TYPE_CHECKING:
    from rich.console import Console

# Ray Tune must not write its own logs, change the working folder of trials, or handle Ctrl-C.
SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of its own state, which is never read: a study resumes from its ledger
}
PIN = 1e-4  # share of the node's own resource: pins trials to the study's node without taking a CPU
PROCESS_LOSSES = 2  # restarts of a lost trial, each from its last checkpoint, before it fails


@dataclass(frozen=True)
class StudyContext:
    """A running study. interrupted: set to end it. notify: called after every entry of its journal."""

    study: StudyConfig
    base: Config
    ledger: Ledger
    tracked: TrackedRun
    console: Console
    interrupted: threading.Event
    notify: Callable[[], None]

    def for_trials(self, train: TrainAndMeasure) -> TrialContext:
        """The context of the trials."""
        uri = absolute_uri(default_uri(self.base.tracking.uri)) if self.base.tracking.enabled else None
        return TrialContext(self.study, Path.cwd(), uri, self.tracked.run_id, train)


def run_trials(context: StudyContext) -> None:
    """Run trials until the budget is spent, all trials are done or the study is interrupted."""
    study, base, ledger = context.study, context.base, context.ledger
    train: TrainAndMeasure = train_both_stages
    own: dict[str, float] = {}  # resources of the trial's process itself, besides its workers
    slots, gpus = partial(groups_of_workers, base.cluster), base.cluster.gpus_per_worker * base.cluster.max_workers
    budget = Budget(study, ledger, context.tracked, gpus, context.notify)
    if study.second_stage_only:
        run_dir = shared_stage_one(context)
        budget.count(running=1)
        train = partial(train_second_stage, shared=load_stage_one(run_dir, base.evaluation))
        own = on_this_node(resources_of(base.cluster))
        slots, budget.gpus = partial(processes_here, own), own.get("GPU", 0.0)
    if context.interrupted.is_set():
        return
    search = LedgerSearch(study, ledger, slots, lambda: context.interrupted.is_set() or budget.spent())
    with Board(study, ledger, context.console) as board:
        tune_trials(search, context.for_trials(train), [board, budget], own)
    if why := budget.why():
        context.console.print(f"the budget is spent: {why}")


def tune_trials(
    search: LedgerSearch, context: TrialContext, callbacks: list[tune.Callback], own: Mapping[str, float]
) -> None:
    """Run Ray Tune once. Trials run on the study's node, where its folder is, and their workers anywhere."""
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    here = f"node:{ray.util.get_node_ip_address()}"
    population = context.study.search.kind == "population"
    # Ray Tune restarts paused members itself, so Ray must limit them by resources; other trials the search limits.
    share = math.floor(1e4 / search.slots()) / 1e4 if population else PIN
    place = tune.PlacementGroupFactory([{here: share, **own}])
    trainable: Any = tune.with_resources(tune.with_parameters(TrialRun, context=context), place)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the board reports on trials
    scheduler = build_scheduler(context.study, search.ledger.trials)
    space: dict[str, Any] = {}
    chosen = tune.TuneConfig(search_alg=search, scheduler=scheduler, num_samples=-1)
    if population:  # population-based training does not accept a searcher
        space = {"member": tune.grid_search([member(trial) for trial in search.population()])}
        chosen, callbacks = tune.TuneConfig(scheduler=scheduler), [*callbacks, Members(search)]
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=chosen,
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(context.study.folder / RAY),
            verbose=0,
            callbacks=callbacks,
            stop=lambda trial_id, result: search.over(),
            failure_config=tune.FailureConfig(max_failures=PROCESS_LOSSES),
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's notes to its own developers
        tuner.fit()


def groups_of_workers(cluster: ClusterConfig) -> int:
    """Number of trials that fit the cluster at once, each with its largest number of workers."""
    return max(1, places_on(cluster_nodes(), resources_of(cluster)) // cluster.max_workers)


def on_this_node(resources: Mapping[str, float]) -> dict[str, float]:
    """The resources that the study's node has, where trials of stage 2 alone run: a head node may have no GPU."""
    return {name: amount for name, amount in resources.items() if node_resources().get(name, 0.0) >= amount}


def processes_here(own: Mapping[str, float]) -> int:
    """Number of trials that fit the study's node at once."""
    return max(1, places_on([node_resources()], own)) if own else 1


def train_both_stages(config: Config, console: Console, hooks: Hooks) -> Metrics:
    """Train and measure a run as `glann train` does."""
    train(config, console, hooks)
    return require_summary(config)["metrics"]


def shared_stage_one(context: StudyContext) -> Path:
    """Folder of trial 0, whose stage 1 all trials share: the given run, or the base recipe, trained if necessary."""
    study, ledger = context.study, context.ledger
    baseline = next((trial for trial in ledger.trials if trial.number == BASELINE), None) or ledger.start({})
    run_dir = study.run_dir(BASELINE)
    if not baseline.ended:
        began = monotonic()
        if study.stage_one:
            config = read_config(run_dir).model_copy(update={"evaluation": context.base.evaluation})
            manifest, model = open_model(run_dir, s3=config.s3, device="auto")
            metrics = by_key(evaluate(config, manifest, model))
        else:
            config = context.for_trials(train_both_stages).config(BASELINE, {})
            tags = {"glann.study": study.name, "glann.trial": str(BASELINE)}
            hooks = Hooks(context.tracked.run_id, tags)
            metrics = train_both_stages(config, context.console, hooks)
        if not math.isfinite(value := metrics.get(study.metric, math.nan)):
            raise UserError(
                f"the base recipe ends with {study.metric}={value}, so trials cannot be compared with it; "
                "check the recipe, or choose another metric"
            )
        ledger.end(baseline, monotonic() - began, state="finished", value=value, metrics=metrics)
    return run_dir
