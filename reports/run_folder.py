"""Names and readers of the files of a run folder."""

from __future__ import annotations

from pathlib import Path

from ..config.parse import plain_data
from ..config.run import Config, validate
from ..errors import UserError

CONFIG = "config.yaml"


def read_config(run_dir: str | Path) -> Config:
    """The configuration of a run, from its folder.

    Raises:
        UserError: the folder is not a run folder, or the file is damaged.
    """
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {CONFIG}; give one such as runs/digits")
    try:
        return validate(plain_data(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from error
