"""The files of a run folder, by name, and the two that say whose run it is and how it ended.

runs/NAME/config.yaml            what the run was made with, without passwords
          metrics.jsonl          every epoch and event (`storage.journal`)
          checkpoints/           where checkpoint.url is empty
          ray/                   what Ray keeps for itself
          images/                previews, samples, interpolations; large images whole in folders of these names
          model/                 all that is needed to draw images (`inference.package`)
          summary.json           metrics and timings of a finished run
          report.html, MODEL_CARD.md
          tracking.json, tracked-config.yaml     which MLflow run it is, and what that was given
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..config.parse import kind_of, plain_data
from ..config.run import Config, redacted_config, validate
from ..errors import UserError
from ..storage.files import read_document, write_whole
from ..storage.journal import FILE, strict_json

JOURNAL = FILE
CONFIG, SUMMARY, REPORT, CARD = "config.yaml", "summary.json", "report.html", "MODEL_CARD.md"
CARD_PICTURE = "card.webp"  # in IMAGES: samples, small enough for a page that does not scale pictures
IMAGES, MODEL, CHECKPOINTS, RAY = "images", "model", "checkpoints", "ray"
PARTS = ("metrics", "deviations", "timings")  # of a summary: numbers by name
TRACKING, TRACKED_CONFIG = "tracking.json", "tracked-config.yaml"
STUDY = "study.yaml"  # makes it the folder of a study


class DamagedFile(UserError):
    """A file of a run folder is there and is not what was written."""


def read_config(run_dir: str | Path) -> Config:
    """The configuration of a run, from its folder.

    Raises:
        UserError: the folder is not that of a run. DamagedFile: the file cannot be read as a configuration.
    """
    path = Path(run_dir) / CONFIG
    if not path.exists():
        raise UserError(f"{run_dir} is not a run folder: it has no {CONFIG}; give one such as runs/digits")
    try:
        return parse_config(read_document(path), str(path))
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error


def parse_config(data: bytes | dict[str, Any], where: str) -> Config:
    """The configuration in a file, or in a tree of plain data.

    Raises:
        DamagedFile: it is none; in one line.
    """
    try:
        tree = plain_data(data.decode()) if isinstance(data, bytes) else data
        if not isinstance(tree, dict):
            raise ValueError(f"it holds {kind_of(tree)} where sections such as `data:` and `glo:` are needed")
        return validate(tree, where)
    except UserError as error:
        first = str(error).splitlines()[0].removesuffix(f"; in {where}")
        raise DamagedFile(f"{where} is damaged, or not of this version of glann: {first}") from error
    except ValueError as error:
        raise DamagedFile(f"{where} is damaged: {reason_in_words(error)}") from error


def write_config(run_dir: Path, config: Config) -> None:
    """Write the configuration of a run into its folder, without passwords."""
    write_whole(run_dir / CONFIG, redacted_config(config).to_yaml())


def read_summary(run_dir: str | Path) -> dict[str, Any] | None:
    """What a finished run says of itself: metrics, timings, rows, fingerprint; None where it has not finished.

    Numbers that were not finite are NaN.

    Raises:
        DamagedFile: it is not what was written.
    """
    path = Path(run_dir) / SUMMARY
    if not path.exists():
        return None
    try:
        summary = strict_json(read_document(path))
        if not isinstance(summary, dict):
            raise ValueError(f"it holds {kind_of(summary)} where an object is needed")
        for part in PARTS:
            held = summary.setdefault(part, {})
            if not isinstance(held, dict):
                raise ValueError(f"{part} is {kind_of(held)} where an object is needed")
            summary[part] = {name: math.nan if value is None else value for name, value in held.items()}
    except (ValueError, RecursionError, OSError) as error:
        raise _damaged(path, error, "run the same `glann train` again, which finishes the run anew") from error
    return summary


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write what a finished run says of itself; JSON has no word for a number that is not finite: null."""
    finite = {
        part: {name: value if math.isfinite(value) else None for name, value in summary.get(part, {}).items()}
        for part in PARTS
    }
    write_whole(run_dir / SUMMARY, json.dumps(summary | finite, indent=2, allow_nan=False))


def _damaged(path: Path, error: Exception, remedy: str = "") -> DamagedFile:
    return DamagedFile(f"{path} is damaged: {reason_in_words(error)}" + (f"; {remedy}" if remedy else ""))


def reason_in_words(error: Exception) -> str:
    """Why a file could not be read, in a few words of one line."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not text"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error})" if error.doc else "it is empty"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:200]
