"""The trials of a study, run by Ray Tune: who they are, what they share, and how many run at a time."""

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
from ..tracking.connection import absolute_uri, default_uri
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
from .trial import Metrics, Part, TrialRun, Work

if TYPE_CHECKING:
    from rich.console import Console

# Ray Tune must not write logs of its own, move trials to other folders, or take Ctrl-C for itself.
SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of its own state, which nobody reads: the ledger is the study's
}
PIN = 1e-4  # of the resource that every node has one of: trials live on the study's node, and take no CPU there
PROCESS_LOSSES = 2  # after which a trial fails; its run goes on from its checkpoint each time


@dataclass(frozen=True)
class Conduct:
    """A study that goes on: what it is, what it writes to, and who may end it."""

    study: StudyConfig
    base: Config
    ledger: Ledger
    tracked: TrackedRun
    console: Console
    interrupted: threading.Event
    told: Callable[[], None]

    def part(self, work: Work) -> Part:
        """What every trial is told."""
        uri = absolute_uri(default_uri(self.base.tracking.uri)) if self.base.tracking.enabled else None
        return Part(self.study, Path.cwd(), uri, self.tracked.run_id, work)


def run_trials(conduct: Conduct) -> None:
    """Have Ray Tune run trials until the budget is spent, all are done or somebody stops it."""
    study, base, ledger = conduct.study, conduct.base, conduct.ledger
    work: Work = train_both_stages
    own: dict[str, float] = {}  # what a trial takes itself, besides what its workers take
    slots, gpus = partial(groups_of_workers, base.cluster), base.cluster.gpus_per_worker * base.cluster.max_workers
    budget = Budget(study, ledger, conduct.tracked, gpus, conduct.told)
    if study.second_stage_only:
        run_dir = first_stage(conduct)
        budget.count(running=1)
        work = partial(train_second_stage, shared=load_stage_one(run_dir, base.evaluation.extractor))
        own = on_this_node(resources_of(base.cluster))
        slots, budget.gpus = partial(processes_here, own), own.get("GPU", 0.0)
    if conduct.interrupted.is_set():
        return
    search = LedgerSearch(study, ledger, slots, lambda: conduct.interrupted.is_set() or budget.spent())
    with Board(study, ledger, conduct.console) as board:
        tune_trials(search, conduct.part(work), [board, budget], own)
    if why := budget.why():
        conduct.console.print(f"the budget is spent: {why}")


def tune_trials(search: LedgerSearch, part: Part, callbacks: list[Any], own: Mapping[str, float]) -> None:
    """One call of Ray Tune. Trials live on the study's node, where its folder is; their workers live anywhere."""
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    here = f"node:{ray.util.get_node_ip_address()}"
    population = part.study.search.kind == "population"
    # Members that were paused start again as Ray Tune likes, so Ray has to count them; others the search counts.
    share = math.floor(1e4 / search.slots()) / 1e4 if population else PIN
    place = tune.PlacementGroupFactory([{here: share, **own}])
    trainable: Any = tune.with_resources(tune.with_parameters(TrialRun, part=part), place)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what becomes of trials is told by the board
    scheduler = build_scheduler(part.study, search.ledger.trials)
    space: dict[str, Any] = {}
    chosen = tune.TuneConfig(search_alg=search, scheduler=scheduler, num_samples=-1)
    if population:  # Ray Tune lets no search choose its members
        space = {"member": tune.grid_search([member(trial) for trial in search.population()])}
        chosen, callbacks = tune.TuneConfig(scheduler=scheduler), [*callbacks, Members(search)]
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=chosen,
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(part.study.folder / RAY),
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
    """How many trials the cluster has capacity for, each with its largest number of workers: none waits for another."""
    return max(1, places_on(cluster_nodes(), resources_of(cluster)) // cluster.max_workers)


def on_this_node(resources: Mapping[str, float]) -> dict[str, float]:
    """What of this there is on the study's node, where trials of stage 2 alone run: a head may have no GPU."""
    return {name: amount for name, amount in resources.items() if node_resources().get(name, 0.0) >= amount}


def processes_here(own: Mapping[str, float]) -> int:
    return max(1, places_on([node_resources()], own)) if own else 1


def train_both_stages(config: Config, console: Console, hooks: Hooks) -> Metrics:
    """What `glann train` does."""
    train(config, console, hooks)
    return require_summary(config)["metrics"]


def first_stage(conduct: Conduct) -> Path:
    """The run whose stage 1 all trials share, trial 0: the one that was given, or the base recipe, trained now."""
    study, ledger = conduct.study, conduct.ledger
    baseline = next((trial for trial in ledger.trials if trial.number == BASELINE), None) or ledger.start({})
    run_dir = study.run_dir(BASELINE)
    if not baseline.ended:
        began = monotonic()
        if study.stage_one:
            config = read_config(run_dir).model_copy(update={"evaluation": conduct.base.evaluation})
            manifest, model = open_model(run_dir, s3=config.s3)
            metrics = by_key(evaluate(config, manifest, model), model.own)
        else:
            config = conduct.part(train_both_stages).config(BASELINE, {})
            tags = {"glann.study": study.name, "glann.trial": str(BASELINE)}
            hooks = Hooks(conduct.tracked.run_id, tags)
            metrics = train_both_stages(config, conduct.console, hooks)
        if not math.isfinite(value := metrics[study.metric]):
            raise UserError(
                f"the base recipe ends with {study.metric}={value}: there is nothing to compare trials with"
            )
        ledger.end(baseline, monotonic() - began, state="finished", value=value, metrics=metrics)
    return run_dir
