"""The run folder as a command finds it: whose run it is, whether that is finished, and what was damaged on the way.

What config.yaml says of a run is also in its checkpoints, in tracked-config.yaml and in the copy beside checkpoints
that lie elsewhere. A checkpoint is checked by hashes, so where it agrees with a command, config.yaml is written anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from ...cluster.checkpoints import reader
from ...cluster.checkpoints.best import LAST
from ...cluster.checkpoints.layout import DamagedCheckpoint, survey
from ...config.parse import flatten, shown
from ...config.run import Config, redacted_config
from ...errors import UserError
from ...inference.package import check_folder
from ...metrics.result import canonical_keys
from ...reports.run_folder import (
    CONFIG,
    MODEL,
    REPORT,
    SUMMARY,
    TRACKED_CONFIG,
    TRACKING,
    DamagedFile,
    parse_config,
    read_config,
    read_summary,
    write_config,
)
from ...storage.base import MissingObject
from ...storage.files import read_document
from ...storage.open import open_store
from ...tracking.outbox import OutboxState
from .mirror import mirror_store
from .preflight import may_change
from .state import checked_state

log = logging.getLogger(__name__)


def refuse_other_configuration(config: Config, results_agree: Callable[[], bool] | None = None) -> None:
    """A run folder belongs to one configuration, but for what only says where and how it runs (`preflight.may_change`).

    A config.yaml that is damaged, or missing beside checkpoints, is written anew where the newest of these, or else a
    copy of the file, agrees with `config`; and where nothing that was trained depends on it.

    Args:
        results_agree: of a folder with results that no checkpoint of its own stands for, such as the trials of a study:
            whether there are any that say they are of this configuration. Raises UserError where they are of another.
    Raises:
        UserError: naming the first keys that differ, or what to do where nothing says whose run it is.
    """
    fault, differing = "", list[str]()
    if (config.run_dir / CONFIG).exists():
        try:
            differing = differences(read_config(config.run_dir), config)
            if not differing:
                return
            if not read_document(config.run_dir / CONFIG).endswith(b"\n"):
                raise DamagedFile(f"{config.run_dir / CONFIG} is damaged: it ends in the middle of a line")
        except DamagedFile as error:
            fault, differing = str(error), []
    trained, saved = of_checkpoint(config)
    if saved is not None and not differences(saved, config, but=("data.url",)):
        write_anew(config, "its newest checkpoint agrees")
        return
    if differing:
        raise of_another(config, differing)
    if saved is not None:
        raise of_another(config, differences(saved, config, but=("data.url",)))
    if results_agree is not None and results_agree():
        write_anew(config, "the results in its folder agree")
        return
    if results_agree is None and not trained and not (config.run_dir / SUMMARY).exists():
        return
    for where, copy in copies(config):
        if differing := differences(copy, config):
            raise of_another(config, differing)
        write_anew(config, f"{where} agrees")
        return
    if fault:
        raise UserError(
            f"{fault}; nothing else in {config.run_dir} or its checkpoints says which configuration they are of: "
            f"restore {CONFIG}, or remove it if this command's configuration is the run's own"
        )
    log.warning("%s holds a run and no %s: it is taken for one of this configuration", config.run_dir, CONFIG)


def differences(there: Config, here: Config, but: tuple[str, ...] = ()) -> list[str]:
    """`key is A there and B here` for every key that may not change."""
    saved = flatten(redacted_config(there).model_dump(mode="json"))
    given = flatten(redacted_config(here).model_dump(mode="json"))
    return [
        f"{key} is {shown(saved.get(key))} there and {shown(value)} here"
        for key, value in given.items()
        if saved.get(key) != value and not may_change(key) and key not in but
    ]


def of_another(config: Config, differing: list[str]) -> UserError:
    first = ", ".join(differing[:3])
    more = f" and {len(differing) - 3} more differ" if len(differing) > 3 else ""
    return UserError(
        f"{config.run_dir} holds a run of another configuration: {first}{more}; start a new one with name=..."
    )


def of_checkpoint(config: Config) -> tuple[bool, Config | None]:
    """Whether there are checkpoints, and the configuration that the newest readable one was saved with.

    None where none can be read, or the newest was saved by a version that did not keep it. Addresses in it are
    absolute, as workers have them; that the data are the same is known by their fingerprint.

    Raises:
        EnvironmentFault: the store does not answer.
    """
    store = open_store(config.checkpoint_url, config.s3)
    found = survey(store)
    for step in sorted(found.good, reverse=True):
        where = f"{store.url}: the state of step {step}"
        with suppress(DamagedCheckpoint, DamagedFile, MissingObject):
            tree = checked_state(reader.load_state(store, step), where).get("config")
            return True, None if tree is None else parse_config(tree, where)
    return bool(found.good or found.damaged), None


def copies(config: Config) -> Iterator[tuple[str, Config]]:
    """Where else the configuration of a run stands and can be read, and what is there."""
    tracked = config.run_dir / TRACKED_CONFIG
    with suppress(DamagedFile, OSError, ValueError):
        yield str(tracked), parse_config(read_document(tracked), str(tracked))
    if (store := mirror_store(config)) is not None:
        where = f"{store.url}/{CONFIG}"
        with suppress(DamagedFile, MissingObject):
            yield where, parse_config(store.read(CONFIG), where)


def write_anew(config: Config, why: str) -> None:
    """Write config.yaml, unless the folder is still to be made."""
    if config.run_dir.is_dir():
        write_config(config.run_dir, config)
        log.warning("%s was damaged or missing and is written anew: %s", config.run_dir / CONFIG, why)


def is_finished(config: Config) -> bool:
    """Whether the run is trained, packaged and reported; with a warning not where its summary or model is damaged, or
    made of another checkpoint than configured.
    """
    if not was_finished(config):
        return False
    try:
        use = require_summary(config).get("use", LAST)
        if (config.run_dir / MODEL).is_dir():  # one that was removed is not missed
            check_folder(config.run_dir / MODEL)
    except UserError as error:
        log.warning("%s: the run is finished anew", str(error).split("; ")[0])
        return False
    if use != config.checkpoint.use:
        log.warning(
            "%s was finished with checkpoint.use=%s: it is measured and packaged anew with checkpoint.use=%s",
            config.run_dir,
            use,
            config.checkpoint.use,
        )
    return use == config.checkpoint.use


def was_finished(config: Config) -> bool:
    """Whether there is what the last words of a run leave behind, damaged or not."""
    return (config.run_dir / SUMMARY).exists() and (config.run_dir / REPORT).exists()


def require_summary(config: Config) -> dict[str, Any]:
    """The summary of a finished run, with all that is shown of one: metrics, train_s and rows, all numbers.

    Raises:
        DamagedFile: it is not there, or not what was written.
    """
    summary = read_summary(config.run_dir) or {"metrics": {}, "timings": {}}
    summary |= {"metrics": canonical_keys(summary["metrics"])}
    needed = (*summary["metrics"].values(), summary["timings"].get("train_s"), summary.get("rows"))
    if not all(isinstance(value, int | float) for value in needed):
        raise DamagedFile(f"{config.run_dir / SUMMARY} is damaged: it lacks metrics, rows or train_s")
    return summary


def require_checkpoint(config: Config) -> None:
    """A run that was finished is finished anew from a checkpoint, and never trained a second time unasked.

    Raises:
        UserError: there is none.
    """
    if was_finished(config) and not of_checkpoint(config)[0]:
        raise UserError(
            f"{config.run_dir} was finished, its {SUMMARY} or {MODEL}/ is damaged, and {config.checkpoint_url} holds "
            f"no checkpoint to finish it from: restore them, or remove {config.run_dir / REPORT} to train it again"
        )


def take_back_tracking(config: Config) -> None:
    """Replace a damaged tracking.json by its copy, if there is one: the run keeps its place in MLflow.

    Raises:
        UserError: it is damaged, and so is the copy, or there is none.
    """
    try:
        OutboxState.load(config.run_dir)
    except UserError:
        store = mirror_store(config)
        if store is None or not store.exists(TRACKING):
            raise
        store.download(TRACKING, config.run_dir / TRACKING)
        OutboxState.load(config.run_dir)
        log.warning("%s was damaged and is its copy beside the checkpoints now", config.run_dir / TRACKING)
