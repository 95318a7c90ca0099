"""Driver of `glann tune`: runs or resumes a study and writes its report."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..cluster.nodes.ray import ray_cluster, require_ray
from ..config.run import Config
from ..datasets.fit import held_out_of
from ..errors import GlannError, UserError
from ..metrics.features.extractor import build_extractor
from ..metrics.result import from_key
from ..reports.run_folder import RAY, REPORT
from ..storage.files import write_whole
from ..tracking.runs import TrackedRun
from ..trainers.objective import Objective
from ..trainers.run.folder import take_back_tracking
from ..trainers.run.lifecycle import open_run
from ..trainers.run.mirror import RunMirror, take_back
from ..trainers.run.preflight import is_worked_on, open_data
from ..trainers.run.recovery import RunStopped, stop_on_signal
from ..trainers.run.status_file import status_file
from .folder import is_study, refuse_other_study
from .ledger import Ledger, trials
from .report.study import TABLE, write_report
from .shared import catch_up, held
from .status import StudyTelemetry
from .study import FILE, StudyConfig

if TYPE_CHECKING:
    from rich.console import Console


def run_study(study: StudyConfig, console: Console, resume: bool = False) -> Path:
    """Run the remaining trials of a study; returns the path of its report.

    Raises:
        UserError: invalid input. EnvironmentFault: no cluster, or storage or a server failed.
        RunStopped: SIGINT or SIGTERM; every trial is saved.

    Whatever is raised, a new study without a trial leaves no files.
    """
    study, fresh = study.with_absolute_paths(), not study.folder.exists()
    if resume and not is_study(study.folder):
        raise UserError(f"{study.folder} holds no study to resume; leave --resume out to start one")
    base = study.base()
    try:
        if take_back(base):
            console.print(f"resuming with the copy of the study folder beside {base.checkpoint_url}")
        refuse_other_study(study, base)
        take_back_tracking(base)
        if not study.is_done(trials(study.folder).values()):
            require_ray(base)
        index = open_data(base, console)
        if from_key(study.metric).reference and held_out_of(base, index) is None:
            raise UserError(
                f"metric={study.metric} needs held-out images, and {base.data.url} has none; pack it anew with "
                "--holdout, or set evaluation.data"
            )
        Objective(base, torch.device("cpu"))  # downloads the weights once, before the trials need them
        build_extractor(base.evaluation.extractor)
        tags = {"glann.study": study.name, "glann.fingerprint": index.fingerprint}
        mirror, opened = RunMirror(base, of_study), False
        try:
            with held(base, mirror, console.print) as share, open_run(base, study.folder, "tune", tags) as tracked:
                opened = True
                write_whole(study.folder / FILE, study.to_yaml())
                catch_up(study, base)
                run_and_report(study, base, tracked, console, mirror, share)
        finally:
            if opened:
                if trials(study.folder):
                    mirror.close(console.print)
                shutil.rmtree(study.folder / RAY, ignore_errors=True)
    except BaseException:
        if fresh and study.folder.exists() and not is_worked_on(study.folder) and not trials(study.folder):
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
    """Run the remaining trials on the recipe's cluster.

    Raises:
        RunStopped: SIGINT or SIGTERM.
    """
    interrupted = threading.Event()
    with ray_cluster(base), stop_on_signal(partial(request_stop, interrupted, console)):
        from .trials import StudyContext, run_trials  # late: Ray reads its settings on import

        run_trials(StudyContext(study, base, ledger, tracked, console, interrupted, mirror.send_soon))
    if interrupted.is_set():
        raise RunStopped(f"study {study.name} was stopped and is saved; the same command resumes it")


def run_and_report(
    study: StudyConfig,
    base: Config,
    tracked: TrackedRun,
    console: Console,
    mirror: RunMirror,
    share: Callable[[Path], None],
) -> None:
    """Run the remaining trials, then write the report, also if they failed. `share`: copies the ledger."""
    ledger = Ledger(study.folder, share)
    try:
        with status_file(base, StudyTelemetry(study, ledger, tracked.address)):
            if ledger.trials:
                share(ledger.path)  # its last lines may have been written while shared storage could not be reached
            if study.is_done(ledger.trials):
                console.print(f"all {study.trials_in_all} trials have ended; more with --trials")
            else:
                run_on_cluster(study, base, ledger, tracked, console, mirror)
    finally:
        report_study(study, ledger, tracked, console)
        ledger.close()


def report_study(study: StudyConfig, ledger: Ledger, tracked: TrackedRun, console: Console) -> None:
    """Write and track the report. A failure is only printed, so that it does not hide an error of the study."""
    if not any(trial.ended for trial in ledger.trials):
        return
    try:
        for path in (study.folder / FILE, write_report(study), study.folder / TABLE):
            tracked.log_artifact(path)
    except GlannError as error:
        console.print(f"the report of {study.name} could not be written: {error}", soft_wrap=True)


def request_stop(interrupted: threading.Event, console: Console) -> None:
    """Have the study end, and print what happens now."""
    interrupted.set()
    console.print(
        "saving every trial, then stopping (press Ctrl-C again to stop at once, without saving)", soft_wrap=True
    )


def of_study(key: str) -> bool:
    """Whether a file belongs to the study itself, its logs included: runs of trials are copied by their own mirrors."""
    return ("/" not in key or key.startswith("logs/")) and not key.startswith(".")
