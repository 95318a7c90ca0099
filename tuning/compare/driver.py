"""Driver of `glann compare`: makes the runs that are not done yet, measures them, and writes the report.

Every run goes through the driver of `glann train`, with its checkpoints, its folder and its MLflow run. The ledger is
that of a study with a trial for every run; the last trial of a method and seed counts.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from ...cluster.nodes.ray import ray_cluster, require_ray
from ...config.run import Config
from ...errors import GlannError, redact
from ...reports.run_folder import REPORT
from ...storage.files import write_whole
from ...tracking.registry.lineage import STUDY
from ...tracking.runs import TrackedRun
from ...trainers.run.driver import train
from ...trainers.run.events import Event, Training
from ...trainers.run.folder import refuse_other_configuration, require_summary, take_back_tracking
from ...trainers.run.hooks import Hooks
from ...trainers.run.lifecycle import open_run
from ...trainers.run.preflight import open_data
from ...trainers.run.recovery import RunStopped
from ..ledger import Ledger, Trial, reason, trials
from .comparison import FILE, Cell, Comparison
from .folder import refuse_other_comparison
from .measure import FIT_S, TRAIN_S, Bench, Metrics, seconds_of
from .report import TABLE, write_report
from .table import last_of_each

if TYPE_CHECKING:
    from rich.console import Console

METHOD = "glann.method"  # tag of a run in MLflow
LOGS = "logs"


@dataclass
class Clock:
    """The budget of a run, for its hooks.

    used_s: seconds of training before this start, and of the stage 1 that the run takes over.
    """

    minutes: float | None
    used_s: float = 0.0
    began: float | None = field(default=None, init=False)
    spent: bool = field(default=False, init=False)

    def notify(self, event: Event) -> None:
        """Begin when the workers train: waiting for them costs nothing."""
        if self.began is None and isinstance(event, Training):
            self.began = monotonic()

    def stop(self) -> str:
        if self.minutes is None or self.began is None:
            return ""
        self.spent = self.spent or self.used_s + monotonic() - self.began > 60 * self.minutes
        return f"the budget of {self.minutes:g} minutes is spent" if self.spent else ""


def run_comparison(comparison: Comparison, console: Console, retry: bool = False) -> Path:
    """Make the runs that are not done; returns the path of the report.

    Args:
        retry: also make those again that failed.
    Raises:
        UserError: invalid input. EnvironmentFault: no cluster, or storage or a server failed.
        RunStopped: SIGINT or SIGTERM; the run in progress is saved.
    """
    comparison = comparison.with_absolute_paths()
    base = comparison.base()
    refuse_other_comparison(comparison)
    begun = trials(comparison.folder)
    refuse_other_configuration(base, (lambda: True) if begun else None)
    take_back_tracking(base)
    left = remaining(comparison, begun.values(), retry)
    if left:
        require_ray(base)
    index = open_data(base, console)
    tags = {STUDY: comparison.name, "glann.fingerprint": index.fingerprint}
    with open_run(base, comparison.folder, "compare", tags) as tracked:
        write_whole(comparison.folder / FILE, comparison.to_yaml())
        ledger = Ledger(comparison.folder)
        try:
            if left:
                with ray_cluster(base):
                    run_cells(comparison, base, left, ledger, tracked, console)
            else:
                console.print("all runs have ended; those that failed are made again with --retry")
        finally:
            ledger.close()
            report_comparison(comparison, tracked, console)
    return comparison.folder / REPORT


def remaining(comparison: Comparison, found: Collection[Trial], retry: bool) -> list[Cell]:
    """The runs that are to be made, in order."""
    last = last_of_each(found)
    return [
        cell
        for cell in comparison.cells()
        if cell not in last or not last[cell].ended or (retry and last[cell].state == "failed")
    ]


def run_cells(
    comparison: Comparison, base: Config, cells: list[Cell], ledger: Ledger, tracked: TrackedRun, console: Console
) -> None:
    """Make these runs one after the other. A run that fails is recorded with its reason, and the next one begins."""
    bench = Bench.build(comparison, base)
    bench.draw_real(base)
    for number, cell in enumerate(cells, 1):
        console.print(f"run {number} of {len(cells)}: {cell}", markup=False, highlight=False)
        trial = last_of_each(ledger.trials).get(cell)
        if trial is None or trial.ended:
            trial = ledger.start({"method": cell.method, "seed": cell.seed})
        clock, began = Clock(comparison.budget_minutes), monotonic()
        try:
            metrics = run_cell(comparison, cell, clock, bench, tracked)
        except Exception as error:
            seconds = monotonic() - began
            if isinstance(error, RunStopped) and not clock.spent:
                ledger.interrupt(trial, seconds)
                raise RunStopped(f"comparison {comparison.name}: {error}") from error
            why = clock.stop() or reason(error)
            log_of(comparison, cell).open("a").write(redact(traceback.format_exc()))
            ledger.end(trial, seconds, state="failed", why=why)
            console.print(f"  failed: {redact(why)}", markup=False, highlight=False, soft_wrap=True)
            continue
        ledger.end(trial, monotonic() - began, state="finished", metrics=metrics)
        console.print(f"  {(monotonic() - began) / 60:.1f} min", markup=False, highlight=False)
        report_comparison(comparison, tracked, console, final=False)


def run_cell(comparison: Comparison, cell: Cell, clock: Clock, bench: Bench, tracked: TrackedRun) -> Metrics:
    """Train and measure a run, resuming where it stopped; what it prints goes to its log."""
    from rich.console import Console

    config = comparison.run(cell)
    source = Cell(comparison.stage_ones[cell.method], cell.seed)
    before = seconds_of(comparison.run(source))
    shared_s = next(iter(before.values()), 0.0) if source != cell else 0.0
    clock.used_s = shared_s + sum(seconds_of(config).values())
    uri = {"register_as": None}
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update=uri)})
    hooks = Hooks(tracked.run_id, {STUDY: comparison.name, METHOD: cell.method}, clock.notify, clock.stop)
    log_of(comparison, cell).parent.mkdir(exist_ok=True)
    with log_of(comparison, cell).open("a", encoding="utf-8", buffering=1) as file:
        train(config, Console(file=file, width=120), hooks)
    summary = require_summary(config)
    timings = summary["timings"]
    fit_s = float(timings.get("stage_2_s", 0.0))
    train_s = shared_s + float(timings.get("stage_1_s", 0.0)) + fit_s
    return summary["metrics"] | bench.measure(config) | {FIT_S: fit_s, TRAIN_S: train_s}


def log_of(comparison: Comparison, cell: Cell) -> Path:
    return comparison.folder / LOGS / f"{comparison.run(cell).name}.log"


def report_comparison(comparison: Comparison, tracked: TrackedRun, console: Console, final: bool = True) -> None:
    """Write the report, and track it when it is final. A failure is printed, so that it hides no other error."""
    if not any(trial.ended for trial in trials(comparison.folder).values()):
        return
    try:
        report = write_report(comparison)
        if final:
            for path in (comparison.folder / FILE, report, comparison.folder / TABLE):
                tracked.log_artifact(path)
    except GlannError as error:
        console.print(f"the report of {comparison.name} could not be written: {error}", soft_wrap=True)
