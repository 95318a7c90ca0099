"""Load a study from its file, with overrides of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config.parse import explain, kind_of, plain_data, shown
from ..config.run import RECIPES, known_keys, read_override
from ..errors import UserError
from ..metrics.result import BASELINE as GAUSSIAN
from ..metrics.result import OWN, RECONSTRUCTION, from_key, to_key
from .space import premises
from .study import StudyConfig

STUDIES = RECIPES / "studies"
MEASURED = {OWN: "their own sampler", GAUSSIAN: "the baseline", RECONSTRUCTION: "reconstructions, if it is bounded"}


def is_study_file(file: str) -> bool:
    """Whether it is a study: a YAML file with a `space`, or a bundled one; studies/NAME where NAME is a recipe too."""
    path = Path(file)
    if path.is_file():
        try:
            tree = plain_data(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):  # reported by what reads it as a recipe
            return False
        return isinstance(tree, dict) and "space" in tree
    bundled = f"{path.name.removesuffix('.yaml')}.yaml"
    places = ("studies",) if (RECIPES / bundled).is_file() else (".", "studies")
    return path.parent.as_posix() in places and (STUDIES / bundled).is_file()


def load_study(file: str | Path, trials: int | None = None, overrides: Iterable[str] = ()) -> StudyConfig:
    """Load a study from a YAML file, or a bundled study by name.

    Args:
        trials: replaces `budget.trials`.
        overrides: `dotted.key=value` strings, of the study such as `budget.trials=50`, or of its recipe.
    Raises:
        UserError: one line per fault; also if the space admits a value that the recipe does not.
    """
    path = _find(file)
    try:
        tree = plain_data(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold keys such as `recipe:` and `space:`, not {kind_of(tree)}")
    _override(tree, overrides)
    if trials is not None and isinstance(budget := tree.get("budget", {}), dict):
        tree["budget"] = budget | {"trials": trials}
    try:
        study = StudyConfig.model_validate(tree)
    except ValidationError as error:
        faults = [explain(fault, known_keys(StudyConfig)) for fault in error.errors(include_url=False)[:10]]
        raise UserError("\n       ".join([f"{faults[0]}; in {path}", *faults[1:]])) from error
    study = _of_own_sampler(study, path)
    _check_extremes(study, path)
    return study


def _override(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set keys of the study, or in its `overrides`, in place."""
    for key, value in map(read_override, overrides):
        if key.split(".")[0] in StudyConfig.model_fields:
            *sections, leaf = key.split(".")
        else:
            sections, leaf = ["overrides"], key
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"override {shown(key)}: {section[:100]} is a value, not a section")
        node[leaf] = value


def _find(file: str | Path) -> Path:
    path = Path(file)
    if path.is_file():
        return path
    bundled = STUDIES / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent.as_posix() in (".", "studies") and bundled.is_file():
        return bundled
    names = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
    raise UserError(f"no such study: {file} (give a YAML file, or one of: {names})")


def _of_own_sampler(study: StudyConfig, path: Path) -> StudyConfig:
    """`imle/NAME` is `NAME` where all trials have IMLE as their own sampler.

    Raises:
        UserError: trials do not measure the sampler that the metric names, or do not change what it measures.
    """
    name, sampler, reference = from_key(study.metric)
    if sampler in (None, OWN, GAUSSIAN, RECONSTRUCTION):
        return study
    own = study.base().sampler.kind
    if sampler == own and "sampler.kind" not in study.space:
        return study.model_copy(update={"metric": to_key(name, OWN, reference)})
    measured = ", ".join(f"{to_key(name, kind, reference)} (of {words})" for kind, words in MEASURED.items())
    raise UserError(f"metric={study.metric} is not measured of trials; they measure {measured}; in {path}")


def _check_extremes(study: StudyConfig, path: Path) -> None:
    """Refuse a space whose bounds or choices are invalid for the recipe."""
    base = study.base()
    if study.stops_early and study.scheduler.by == "score" and base.evaluation.every_epochs is None:
        raise UserError(
            "scheduler.by=score compares what is measured while trials train; set evaluation.every_epochs in the "
            f"overrides; in {path}"
        )
    for key, dimension in study.space.items():
        for value in dimension.extremes():
            try:
                study.trial(1, premises(study.space, key) | {key: value})
            except UserError as error:
                raise UserError(f"space.{key} admits {json.dumps(value)}, which is impossible: {error}") from error
