"""Ranking of the trials of a study, and the command that trains one of them again."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...config.run import find_recipe
from ...errors import redact
from ...reports.run_folder import CONFIG
from ...trainers.run.shared import is_job
from ..ledger import BASELINE, Trial
from ..space import Params, dependencies_first
from ..study import StudyConfig, trial_name

MAX_TEXT = 60  # characters of a value on the page
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would evaluate a cell that starts with one of these


@dataclass(frozen=True)
class Row:
    """A trial and its rank: 1 is the best; None unless the trial has finished."""

    rank: int | None
    name: str
    trial: Trial

    @property
    def is_base(self) -> bool:
        """Whether the trial is the base recipe."""
        return self.trial.number == BASELINE


def leaderboard(study: StudyConfig, trials: Iterable[Trial]) -> list[Row]:
    """All trials in order: finished ones by value, then stopped, running and failed ones, each group by epochs reached
    (most first), then by loss."""
    ordered = sorted(trials, key=lambda trial: _place(study, trial))
    valued = sum(map(_valued, ordered))
    return [
        Row(at + 1 if at < valued else None, trial_name(study.name, trial.number), trial)
        for at, trial in enumerate(ordered)
    ]


def recipe_params(study: StudyConfig) -> Params:
    """Values of the base recipe for the keys of the space whose conditions hold.

    Raises:
        UserError: the recipe cannot be read.
    """
    tree = study.base().model_dump(mode="json")
    params: Params = {}
    for key in dependencies_first(study.space):
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if study.space[key].holds(params):
            params[key] = value
    return params


def text(value: object) -> str:
    """Format a value for the page: four digits, one short line, no passwords."""
    if isinstance(value, float):
        return f"{value:.4g}"
    words = " ".join(redact(value if isinstance(value, str) and value.isprintable() else as_yaml(value)).split())
    return words if len(words) <= MAX_TEXT else words[: MAX_TEXT - 1] + "…"


def as_yaml(value: object) -> str:
    """A value as YAML for an override; parsing it gives the same value."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=False)
    return dumped.removesuffix("\n").removesuffix("\n...")


def command(study: StudyConfig, trial: Trial) -> str:
    """The shell command that trains the model of a trial again, as a separate run. Passwords are left out.

    A recipe that came with the study is no file of its own: there it is the configuration of the trial's run.

    Raises:
        UserError: the recipe cannot be read.
    """
    verb = "submit" if is_job() else "train"
    if isinstance(study.recipe, dict):
        name = trial_name(study.name, trial.number)
        path = f"{Path(study.studies_dir).name}/{study.name}/trials/{name}/{CONFIG}"  # as fetched
        return shlex.join(["glann", verb, path, f"name={study.name}-best", "runs_dir=runs"])
    config = study.trial(trial.number, trial.params)
    settings = {"evaluation.extractor": config.evaluation.extractor} | study.overrides | trial.params
    if study.search.kind == "population":
        settings["checkpoint.every_epochs"] = config.checkpoint.every_epochs
    words = [f"{key}={redact(as_yaml(value))}" for key, value in settings.items()]
    return shlex.join(["glann", verb, recipe_name(study), *words, f"name={study.name}-best"])


def recipe_name(study: StudyConfig) -> str:
    """The recipe argument for `glann train`: the name of a bundled recipe, else the path of the file."""
    if study.stage_one:
        return f"{study.stage_one}/{CONFIG}"
    return find_recipe(str(study.recipe)).stem if study.is_bundled else str(study.recipe)


def as_csv(study: StudyConfig, rows: list[Row]) -> str:
    """The leaderboard as CSV, with values in full precision."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["rank", "trial", "state", study.metric, *study.space, "epoch", "loss", "seconds", "why"])
    for row in rows:
        trial = row.trial
        params = recipe_params(study) if row.is_base else trial.params
        searched = [params.get(key, "") for key in study.space]
        facts = [row.rank, row.name, trial.state, trial.value, *searched, trial.epoch, trial.loss, trial.seconds]
        writer.writerow([_cell(value) for value in [*facts, trial.why]])
    return file.getvalue()


def _cell(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    words = redact(value if isinstance(value, str) else as_yaml(value))
    return f"'{words}" if words.startswith(_FORMULA) else words


def _valued(trial: Trial) -> bool:
    return trial.state == "finished" and trial.value is not None


def _place(study: StudyConfig, trial: Trial) -> tuple[float, ...]:
    if _valued(trial):
        value = trial.value or 0.0
        return 0, value if study.minimize else -value, trial.number
    order = {"finished": 1, "stopped": 2, "running": 3, "failed": 4}[trial.state]
    return order, -trial.epoch, math.inf if trial.loss is None else trial.loss, trial.number
