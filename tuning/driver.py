"""`glann tune`: from a study to a report, the same command also after an interruption."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..cluster.nodes.ray import ray_cluster
from ..config.run import Config
from ..errors import GlannError, UserError
from ..metrics.features.extractor import build_extractor
from ..reports.run_folder import RAY, REPORT
from ..storage.files import write_whole
from ..tracking.runs import TrackedRun
from ..trainers.objective import build_objective
from ..trainers.run.folder import take_back_tracking
from ..trainers.run.lifecycle import open_run
from ..trainers.run.mirror import RunMirror, take_back
from ..trainers.run.preflight import open_data
from ..trainers.run.recovery import RunStopped, stop_on_signal
from .folder import is_study, refuse_other_study
from .ledger import Ledger
from .report.study import TABLE, write_report
from .study import FILE, StudyConfig

if TYPE_CHECKING:
    from rich.console import Console


def run_study(study: StudyConfig, console: Console, resume: bool = False) -> Path:
    """Run what is left of a study; its report.

    Raises:
        UserError: something given is wrong; a study that had not begun leaves nothing behind.
        RunStopped: SIGINT or SIGTERM; every trial is saved.
    """
    study, fresh = study.with_absolute_paths(), not study.folder.exists()
    if resume and not is_study(study.folder):
        raise UserError(f"{study.folder} holds no study to resume; leave --resume out to start one")
    base = study.base()
    try:
        if take_back(base):
            console.print(f"going on with the copy of the study folder beside {base.checkpoint_url}")
        refuse_other_study(study, base)
        take_back_tracking(base)
        index = open_data(base, console)
        build_objective(base, torch.device("cpu"))  # fetches what trials need, once
        build_extractor(base.evaluation.extractor)
        tags = {"glann.study": study.name, "glann.fingerprint": index.fingerprint}
        mirror, opened = RunMirror(base, of_study), False
        try:
            with open_run(base, study.folder, "tune", tags) as tracked:
                fresh, opened = False, True
                write_whole(study.folder / FILE, study.to_yaml())
                conduct(study, base, tracked, console, mirror)
        finally:
            if opened:
                mirror.close(console.print)
                shutil.rmtree(study.folder / RAY, ignore_errors=True)
    except UserError:
        if fresh:
            shutil.rmtree(study.folder, ignore_errors=True)
        raise
    return study.folder / REPORT


def run_on_cluster(
    study: StudyConfig,
    base: Config,
    ledger: Ledger,
    tracked: TrackedRun,
    console: Console,
    mirror: RunMirror,
) -> None:
    """Have the trials that are left run on the recipe's cluster.

    Raises:
        RunStopped: SIGINT or SIGTERM.
    """
    interrupted = threading.Event()
    with ray_cluster(base), stop_on_signal(partial(say_stopping, interrupted, console)):
        from .trials import Conduct, run_trials  # Ray reads its settings when it is imported

        run_trials(Conduct(study, base, ledger, tracked, console, interrupted, mirror.send_soon))
    if interrupted.is_set():
        raise RunStopped(f"study {study.name} was stopped and is saved; the same command goes on with it")


def conduct(study: StudyConfig, base: Config, tracked: TrackedRun, console: Console, mirror: RunMirror) -> None:
    """Run the trials that are left, and report."""
    ledger = Ledger(study.folder)
    wanted, trials = study.trials_in_all, ledger.trials
    done = len(trials) >= wanted and all(trial.ended for trial in trials)
    try:
        if done:
            console.print(f"all {wanted} trials have ended; more with --trials")
        else:
            run_on_cluster(study, base, ledger, tracked, console, mirror)
    finally:
        tell(study, ledger, tracked, console)
        ledger.close()


def tell(study: StudyConfig, ledger: Ledger, tracked: TrackedRun, console: Console) -> None:
    """Write the report, finished or not; that it cannot be written must not hide how the study ended."""
    if not any(trial.ended for trial in ledger.trials):
        return
    try:
        for path in (study.folder / FILE, write_report(study), study.folder / TABLE):
            tracked.log_artifact(path)
    except GlannError as error:
        console.print(f"the report of {study.name} could not be written: {error}", soft_wrap=True)


def say_stopping(interrupted: threading.Event, console: Console) -> None:
    interrupted.set()
    console.print(
        "saving every trial, then stopping (press Ctrl-C again to stop at once, without saving)", soft_wrap=True
    )


def of_study(key: str) -> bool:
    """Whether a file of the study folder is the study's own: trials have copies of their own."""
    return "/" not in key and not key.startswith(".")
