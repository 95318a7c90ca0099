"""The folder of a study, studies/NAME: its configuration and its best run."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from ..config.parse import explain, kind_of, plain_data, shown
from ..config.run import Config, known_keys
from ..errors import UserError
from ..reports.run_folder import CONFIG, DamagedFile, read_config, reason_in_words
from ..storage.base import MissingObject
from ..storage.files import read_document, write_whole
from ..trainers.run.folder import differences, refuse_other_configuration
from ..trainers.run.mirror import mirror_store
from ..trainers.run.preflight import may_change
from .ledger import BASELINE, Trial, best_of, trials
from .ledger import FILE as LEDGER
from .study import FILE, StudyConfig

log = logging.getLogger(__name__)


def is_study(folder: str | Path) -> bool:
    """Whether it is the folder of a study; one that has begun has trials, whatever became of its study.yaml."""
    return any((Path(folder) / name).is_file() for name in (FILE, LEDGER))


def best_run(folder: str | Path) -> Path:
    """The run folder of the best trial of a study.

    Raises:
        UserError: none has finished yet, or the folder is damaged.
    """
    study = saved_study(Path(folder))
    best = best_of(trials(Path(folder)).values(), study.minimize)
    if best is None:
        raise UserError(f"no trial of {folder} has finished yet")
    return study.run_dir(best.number)


def saved_study(folder: Path) -> StudyConfig:
    """The study in a folder, also if the folder was moved.

    Raises:
        DamagedFile: study.yaml is not there, or not what was written.
    """
    path = folder / FILE
    try:
        study = parse_study(read_document(path))
    except (ValueError, OSError) as error:
        raise DamagedFile(
            f"{path} is damaged: {reason_in_words(error)}; the same `glann tune` writes it anew where the trials agree"
        ) from error
    return study.model_copy(update={"studies_dir": str(folder.absolute().parent)})


def parse_study(data: bytes) -> StudyConfig:
    """Raises ValueError where it is not a study that was saved, in one line."""
    tree = plain_data(data.decode())
    if not isinstance(tree, dict):
        raise ValueError(f"it holds {kind_of(tree)} where keys such as `recipe:` and `space:` are needed")
    if not data.endswith(b"\n"):
        raise ValueError("it ends in the middle of a line")
    try:
        return StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error.errors(include_url=False)[0], known_keys(StudyConfig))) from error


def refuse_other_study(study: StudyConfig, base: Config) -> None:
    """A study folder belongs to one study, but for its budget, and to one base recipe.

    A study.yaml or config.yaml that is damaged, or missing beside trials, is written anew where its copy or the trials
    agree with `study`. Of the search and the scheduler trials say nothing: they are taken as they are given.

    Raises:
        UserError: naming the first key that differs, or what to do where nothing says which study it is.
    """
    begun = bool(trials(study.folder))
    if not _is_there(study, base) and begun:
        if trials_agree(study):
            _write_anew(study, "its trials agree")
        elif os.path.lexists(study.folder / FILE):
            raise UserError(
                f"{study.folder / FILE} is damaged, and no trial in {study.folder} says which study it is: restore "
                f"{FILE}, or remove it if this command's study is the one"
            )
    refuse_other_configuration(base, partial(trials_agree, study) if begun else None)


def _is_there(study: StudyConfig, base: Config) -> bool:
    """Whether study.yaml, or else its copy beside the checkpoints, says that it is this study; not where both are lost.

    Raises:
        UserError: it is another study.
    """
    path = study.folder / FILE
    if os.path.lexists(path):
        with suppress(DamagedFile):
            refuse_other(saved_study(study.folder), study, study.folder)
            return True
    if (store := mirror_store(base)) is not None:
        with suppress(MissingObject, ValueError):
            refuse_other(parse_study(store.read(FILE)), study, study.folder)
            if study.folder.is_dir():
                _write_anew(study, f"{store.url}/{FILE} agrees")
            return True
    return False


def _write_anew(study: StudyConfig, why: str) -> None:
    write_whole(study.folder / FILE, study.to_yaml())
    log.warning("%s was damaged or missing and is written anew: %s", study.folder / FILE, why)


def refuse_other(saved: StudyConfig, study: StudyConfig, where: str | Path) -> None:
    """Refuse a study that differs from the one saved at `where`, naming the first key.

    The recipe is compared as the configuration of the base run: it may be a file of another machine.
    """
    there, here = (each.model_dump(mode="json") for each in (saved, study))
    for tree in (there, here):
        tree["overrides"] = {key: value for key, value in tree["overrides"].items() if not may_change(key)}
    for key in here:
        if key not in ("budget", "studies_dir", "recipe") and there[key] != here[key]:
            why = f"{key} is {shown(there[key])} there and {shown(here[key])} here"
            raise UserError(f"{where} holds another study: {why}; give this one another name")


def _of_another(study: StudyConfig, why: str) -> UserError:
    return UserError(f"{study.folder} holds another study: {why}; give this one another name")


def trials_agree(study: StudyConfig) -> bool:
    """Whether the trials in the folder are of this study; False where there is none to compare.

    Raises:
        UserError: one of them is not.
    """
    compared = 0
    for trial in trials(study.folder).values():
        _refuse_trial(study, trial)
        if trial.number == BASELINE and study.stage_one:
            continue  # a run that was there before the study
        if not (study.run_dir(trial.number) / CONFIG).exists():
            continue
        with suppress(DamagedFile):
            saved = read_config(study.run_dir(trial.number))
            expected = study.trial(trial.number, trial.params).with_absolute_paths()
            # the values of a population change on the way
            changed = tuple(study.space) if study.search.kind == "population" else ()
            if differing := differences(saved, expected, but=changed):
                raise _of_another(study, f"of trial {trial.number}, {differing[0]}")
            compared += 1
    return compared > 0


def _refuse_trial(study: StudyConfig, trial: Trial) -> None:
    """Refuse a trial whose values the space does not have, or whose value is not of the study's metric."""
    for key, value in trial.params.items():
        dimension = study.space.get(key)
        fixed = study.search.kind != "population"
        if dimension is None or (fixed and dimension.encode(value) is None):
            raise _of_another(study, f"trial {trial.number} has {key}={shown(value)}, which this space does not")
    if trial.value is not None and trial.metrics.get(study.metric) != trial.value:
        raise _of_another(study, f"the value of trial {trial.number} is not its {study.metric}")
