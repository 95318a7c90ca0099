"""The folder of a study, studies/NAME: its configuration and its best run."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ..config.parse import plain_data, shown
from ..errors import UserError
from .ledger import best_of, trials
from .study import FILE, StudyConfig


def is_study(folder: str | Path) -> bool:
    """Whether the folder is that of a study."""
    return (Path(folder) / FILE).is_file()


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
        UserError: the file of the study is damaged.
    """
    path = folder / FILE
    try:
        study = StudyConfig.model_validate(plain_data(path.read_text(encoding="utf-8")))
    except (ValidationError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged; restore it, or give the study another name") from error
    return study.model_copy(update={"studies_dir": str(folder.absolute().parent)})


def refuse_other_study(study: StudyConfig) -> None:
    """Refuse a folder that holds another study; only the budget may differ.

    Raises:
        UserError: names the first key that differs.
    """
    if not is_study(study.folder):
        return
    saved = saved_study(study.folder)
    there, here = saved.model_dump(mode="json"), study.model_dump(mode="json")
    for key in here:
        if key not in ("budget", "studies_dir") and there[key] != here[key]:
            difference = f"{key} is {shown(there[key])} there and {shown(here[key])} here"
            raise UserError(f"{study.folder} holds another study: {difference}; give this one another name")
