"""A study in shared storage: held by one command, resumed on another cluster, recognised as finished.

Where checkpoints are in shared storage, the study's own files are copied beside them (`trainers.run.mirror`), and its
ledger before anything depends on a line of it. So the study outlives the head, and trials that ran there are resumed
from their own checkpoints by the same command on a new cluster.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..cluster.checkpoints.lease import hold, require
from ..config.paths import absolute
from ..config.run import Config
from ..errors import UserError
from ..reports.run_folder import CONFIG, MODEL, REPORT, SUMMARY
from ..storage.base import MissingObject, Store
from ..storage.files import write_whole
from ..storage.open import open_store
from ..trainers.run import shared
from ..trainers.run.mirror import RunMirror, mirror_store
from .folder import parse_study, refuse_other
from .ledger import BASELINE, trials
from .ledger import FILE as LEDGER
from .study import FILE, StudyConfig, trial_name

# Held and resumed -----------------------------------------------------------------------------


@contextmanager
def held(base: Config, mirror: RunMirror, say: Callable[[str], None]) -> Iterator[Callable[[Path], None]]:
    """Hold the lease of a study in shared storage; yields a function that copies a file there.

    Raises:
        RunTaken: another command runs the study; also from the function, once another one has taken it over.
    """
    if mirror_store(base) is None:
        yield lambda path: None
        return
    store = open_store(base.checkpoint_url, base.s3)
    with hold(store, say) as lease:

        def share(path: Path) -> None:
            require(store, lease.ticket)
            mirror.send_now(path)

        yield share


def catch_up(study: StudyConfig, base: Config) -> None:
    """Bring the folder of a study up to date with shared storage, where another head may have continued it.

    Of trials all is copied but their models: their journals, pictures and metrics are in the report.

    Raises:
        UserError: both have trials that the other does not.
    """
    store = mirror_store(base)
    if store is None:
        return
    _take_ledger(study, store)
    for number, trial in trials(study.folder).items():
        run_dir = study.run_dir(number)
        if number == BASELINE and study.stage_one:
            continue
        if (run_dir / (SUMMARY if trial.state == "finished" else CONFIG)).exists():
            continue
        whole = number == BASELINE and study.second_stage_only  # all trials start from its model
        trial_store = open_store(f"{store.url.rpartition('/')[0]}/{trial_name(study.name, number)}", base.s3)
        with suppress(shared.NoResults):
            shared.fetch(trial_store, run_dir, True, lambda key: whole or not key.startswith(f"{MODEL}/"))  # noqa: B023


def _take_ledger(study: StudyConfig, store: Store) -> None:
    try:
        there = store.read(LEDGER)
    except MissingObject:
        return
    path = study.folder / LEDGER
    here = path.read_bytes() if path.exists() else b""
    here = here[: here.rfind(b"\n") + 1]  # the rest is a line that was not completed
    if there.startswith(here) and there != here:
        write_whole(path, there)
    elif not here.startswith(there):
        raise UserError(
            f"{study.folder} and {store.url} hold different trials: the study was continued in both; remove "
            f"{study.folder} to resume the one in shared storage"
        )


# Submitted ------------------------------------------------------------------------------------


def for_cluster(study: StudyConfig) -> StudyConfig:
    """The study for the head of a cluster: with its recipe, and on the cluster that it runs on.

    Raises:
        UserError: `stage_one` is a path of this machine.
    """
    if study.stage_one and absolute(study.stage_one) != study.stage_one:
        raise UserError(
            f"stage_one={study.stage_one} is a path of this machine; give the absolute path of a folder that every "
            "node shares"
        )
    update = {"overrides": study.overrides | {"cluster.address": "auto"}}
    return study.self_contained().model_copy(update=update)


def finished(study: StudyConfig) -> shared.Finished | None:
    """The study if shared storage holds its end, with all its trials; None if there is work left, or nothing there.

    Raises:
        OtherRun: the name belongs to another study, or to a run.
        UserError, EnvironmentFault: the storage cannot be read from here; it is not tried for long.
    """
    base = study.base()
    store = shared.quick_store(base)
    if store is None or not store.exists(CONFIG):
        return None
    if not store.exists(FILE):
        raise shared.OtherRun(f"{store.url} holds a run of that name; give this study another --name")
    shared.refuse_other(store, base)
    try:
        refuse_other(parse_study(store.read(FILE)), study, store.url)
    except ValueError:  # damaged: the job reports it
        return None
    except UserError as error:
        raise shared.OtherRun(str(error)) from error
    if not (store.exists(REPORT) and store.exists(LEDGER)):
        return None
    with tempfile.TemporaryDirectory(prefix="glann-study-") as scratch:
        store.download(LEDGER, Path(scratch) / LEDGER)
        found = trials(Path(scratch))
    if not study.is_done(found.values()):
        return None
    return end_of(base, shared.page_of(store), base.tracking.enabled and shared.is_owed(store))


def end_of(base: Config, link: str, owed: bool = False) -> shared.Finished:
    """Where a user of any machine sees the results of a study, and what to do with them. `link`: its page in MLflow."""
    report = f"{shared.shared_url(base)}/{REPORT}"
    register = shlex.join(["glann", "registry", "register", f"studies/{base.name}", "--as", "NAME"])  # as fetched
    return shared.Finished([*([link] if link else []), report], [shared.fetch_command(base), register], owed)
