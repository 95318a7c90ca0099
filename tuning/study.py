"""Configuration of a study: a base recipe, a search space over the recipe's keys, and how to search it.

name: digits-study
recipe: digits
overrides: {cluster.workers: 2, data.max_rows: 1500}     shared by all trials; cluster.* are resources of a trial
space:
  glo.latent_lr: {log_uniform: [0.005, 0.1]}
  sampler.noise_dim: {integer: [8, 32]}
  sampler.statistics: {choice: [noise, batch]}
metric: fd_squeezenet
budget: {trials: 12}
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, field_validator, model_validator

from ..config.address import LocalPath
from ..config.parse import shown, suggest
from ..config.paths import absolute
from ..config.run import (
    RECIPES,
    Config,
    find_recipe,
    has_trait,
    keys_with,
    known_keys,
    load_tree,
    require_trainable,
    set_key,
    validate,
)
from ..config.section import Section, Trait
from ..config.shorthands import canonical, kinds_first, with_shorthands
from ..errors import UserError
from ..metrics.result import HELD_OUT, OWN, from_key, known_results, to_key
from ..metrics.spec import METRICS, Metric, Samples, metric_families
from ..reports.run_folder import CONFIG, STUDY, read_config
from ..trainers.run.preflight import may_change
from .ledger import BASELINE, Trial
from .space import Dimension, dependencies_first, grid

FILE = STUDY
SECOND_STAGE = "sampler."


class SearchConfig(Section):
    """Choice of the values of trials."""

    kind: Literal["tpe", "random", "grid", "population"] = Field(
        "tpe",
        description="tpe: Optuna's, learns from ended trials; grid: every combination; population: poor trials "
        "continue from a copy of a good one, with other learning rates",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the search")
    startup: int = Field(10, ge=1, description="random trials before tpe models anything")
    interval: int = Field(5, ge=1, description="epochs of stage 1 between changes of a population")


class SchedulerConfig(Section):
    """Early stopping of trials."""

    kind: Literal["asha", "none"] = Field("asha", description="asha: the best 1/reduction at every rung continue")
    by: Literal["loss", "score"] = Field(
        "loss",
        description="what is compared. loss: of stage 1, every epoch; score: what evaluation.every_epochs measures",
    )
    grace: int = Field(1, ge=1, description="epochs of stage 1 that every trial gets")
    reduction: float = Field(3.0, gt=1, description="rungs are grace x reduction^k epochs of stage 1")


class BudgetConfig(Section):
    """Limits of a study; it ends when the first is reached."""

    trials: int = Field(20, ge=1, description="trials, including the base recipe")
    hours: float | None = Field(None, gt=0, description="hours, over all starts of the study")
    gpu_hours: float | None = Field(None, gt=0, description="hours times GPUs in use, over all starts of the study")


class StudyConfig(Section):
    """Configuration of a study."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="name of the study; its folder is studies_dir/name"
    )
    studies_dir: LocalPath = Field("studies", description="parent of the study folders")
    recipe: str | dict[str, Any] | None = Field(
        None, description="base recipe: a name, a YAML file, or the recipe itself, as `glann submit` sends it"
    )
    stage_one: LocalPath | None = Field(
        None,
        description="a trained run whose codes and generator all trials share, in place of `recipe` (sampler.* only)",
    )
    overrides: dict[str, Any] = Field({}, description="dotted keys of the recipe that all trials share")
    space: dict[str, Dimension] = Field(min_length=1, description="dotted keys of the recipe and what they range over")
    metric: str = Field(
        description=f"compared: {', '.join(metric_families())}; gaussian/NAME: of the Gaussian baseline, "
        "reconstruction/NAME: of reconstructions; NAME:held-out: against held-out images, where runs measure it"
    )
    direction: Literal["minimize", "maximize"] | None = Field(
        None, description="empty: the better direction of the metric"
    )
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="before")
    @classmethod
    def _take_shorthands(cls, tree: object) -> object:
        """Replace shorthands by the recipe's own keys: `imle.epochs` is `sampler.epochs`."""
        if isinstance(tree, dict):
            given = {name: tree[name] for name in ("space", "overrides") if isinstance(tree.get(name), dict)}
            tree = tree | {name: _canonical_keys(keys) for name, keys in given.items()}
        return tree

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        name, sampler, reference = from_key(metric)
        key, known = to_key(name, sampler, reference), known_results()
        if key not in known:
            names = [*metric_families(), "gaussian/NAME", "reconstruction/NAME", f"NAME:{HELD_OUT}"]
            raise ValueError(f"no such metric{suggest(metric, known)}; there are {', '.join(names)}")
        needs = METRICS[name].needs
        if isinstance(needs, Samples) and needs.codes and reference:
            raise ValueError(f"{name} looks at codes, and held-out images have none; use {to_key(name, sampler)}")
        if METRICS[name].held_out and not reference:
            raise ValueError(f"it is measured against held-out images only; use {to_key(name, sampler, HELD_OUT)}")
        return to_key(name, sampler, reference)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.recipe is None) == (self.stage_one is None):
            raise ValueError("give one of: recipe (both stages), or stage_one (a trained run, for keys of sampler.*)")
        for key in self.space:
            _refuse_key(key)
        for key in ("name", "runs_dir"):
            if key in self.overrides:
                raise ValueError(f"overrides.{key} is set by the study: runs are named after it; remove the key")
        needed, given = self.extractor_needed, self.overrides.get("evaluation.extractor")
        if needed and given not in (None, needed):
            raise ValueError(
                f"metric={self.metric} is measured by {needed}, not by evaluation.extractor={shown(given)}"
            )
        if self.second_stage_only and from_key(self.metric).sampler != OWN:
            raise ValueError(
                f"metric={self.metric} measures stage 1, which sampler.* does not change; use one such as fd_lite0"
            )
        if self.stage_one:
            fixed = [key for key in (*self.space, *self.overrides) if not _of_second_stage(key)]
            if fixed:
                where = f"{fixed[0]} belongs to stage 1, which stage_one={self.stage_one} has completed"
                raise ValueError(f"{where}; give a recipe instead")
        dependencies_first(self.space)  # refuses conditions on unknown keys, and cycles
        if self.search.kind == "grid":
            for key, dimension in self.space.items():
                if dimension.kind not in ("choice", "integer"):
                    raise ValueError(f"space.{key} is continuous, which a grid cannot be; use choice or integer")
            next(grid(self.space))  # refuses one that is too large
        if self.search.kind == "population":
            for key in self.space:
                if not has_trait(key, Trait.SCHEDULABLE):
                    raise ValueError(
                        f"space.{key} cannot change while a run trains, as search.kind=population does; "
                        f"keys that can: {', '.join(keys_with(Trait.SCHEDULABLE))}"
                    )
        losses = self.stops_early and self.scheduler.by == "loss"
        if losses and any(key.startswith("loss.") for key in self.space):
            raise ValueError(
                "losses of different loss.* cannot be compared, so trials cannot be stopped early by them; "
                "set scheduler.kind=none, or scheduler.by=score"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.studies_dir) / self.name

    def run_dir(self, number: int) -> Path:
        """The run folder of a trial."""
        if self.stage_one and number == BASELINE:
            return Path(self.stage_one)
        return self.folder / "trials" / trial_name(self.name, number)

    @property
    def second_stage_only(self) -> bool:
        """Whether all trials can share one stage 1."""
        return all(key.startswith(SECOND_STAGE) for key in self.space)

    @property
    def stops_early(self) -> bool:
        return self.scheduler.kind == "asha" and self.search.kind != "population" and not self.second_stage_only

    @property
    def minimize(self) -> bool:
        return self.measured.better == "lower" if self.direction is None else self.direction == "minimize"

    @property
    def measured(self) -> Metric:
        """The metric that trials are compared by, without its sampler."""
        return METRICS[from_key(self.metric).metric]

    @property
    def trials_in_all(self) -> int:
        """Number of trials unless a time limit ends the study: a grid may have fewer than the budget."""
        if self.search.kind != "grid":
            return self.budget.trials
        return min(self.budget.trials, 1 + sum(1 for _ in grid(self.space)))

    def is_done(self, found: Collection[Trial]) -> bool:
        """Whether all trials have ended."""
        return len(found) >= self.trials_in_all and all(trial.ended for trial in found)

    def with_absolute_paths(self) -> Self:
        """The same study with absolute paths, for processes with another working folder, such as trials."""
        here = {"studies_dir": absolute(self.studies_dir), "stage_one": self.stage_one and absolute(self.stage_one)}
        if isinstance(self.recipe, str) and not self.is_bundled:
            here["recipe"] = str(find_recipe(self.recipe).absolute())
        return self.model_copy(update=here)

    @property
    def is_bundled(self) -> bool:
        """Whether the base recipe is one that ships with glann, which is the same on every machine."""
        return isinstance(self.recipe, str) and find_recipe(self.recipe).absolute().parent == RECIPES.absolute()

    def self_contained(self) -> Self:
        """The same study with the recipe itself in place of a file of this machine."""
        if not isinstance(self.recipe, str):
            return self
        path = find_recipe(self.recipe)
        return self.model_copy(update={"recipe": path.stem if self.is_bundled else load_tree(path)})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)

    # Configurations of its runs ----------------------------------------------------------------

    def base(self) -> Config:
        """The base recipe with the overrides, as a run named after the study.

        Raises:
            UserError: the recipe or an override is invalid.
        """
        return self._config(self.name, self.studies_dir, {})

    def trial(self, number: int, params: dict[str, Any]) -> Config:
        """The configuration of a trial.

        Raises:
            UserError: the combination of values is invalid, or would train something else than configured.
        """
        config = self._config(trial_name(self.name, number), str(self.folder / "trials"), params)
        require_trainable(config)
        return config

    def _config(self, name: str, runs_dir: str, params: dict[str, Any]) -> Config:
        if self.stage_one:
            path = str(Path(self.stage_one) / CONFIG)
            tree = read_config(self.stage_one).model_dump(mode="json")
        elif isinstance(self.recipe, dict):
            path, tree = "its recipe", with_shorthands(deepcopy(self.recipe))
        else:
            path = str(find_recipe(self.recipe or ""))
            tree = load_tree(Path(path))
        where = f"{self.name} on {path}"
        try:
            for key, value in kinds_first(self.overrides | params).items():
                set_key(tree, key, value)
        except UserError as error:
            raise UserError(f"{error}; in {where}") from error
        if self.extractor_needed:
            set_key(tree, "evaluation.extractor", self.extractor_needed)
        if self.measured.group:
            groups = (tree.get("evaluation") or {}).get("metrics") or []
            set_key(tree, "evaluation.metrics", [*dict.fromkeys([*groups, self.measured.group])])
        tree |= {"name": name, "runs_dir": runs_dir}
        if self.search.kind == "population" and "checkpoint.every_epochs" not in self.overrides:
            set_key(tree, "checkpoint.every_epochs", self.search.interval)  # for other members to continue from
        config = validate(tree, where)
        if not config.has_codes and self.second_stage_only:
            raise UserError(f"method={config.method} has no stage 1 to share; search another section; in {where}")
        if not config.has_codes and self.stops_early and self.scheduler.by == "loss":
            raise UserError(
                "the losses of a critic do not rank trials; set scheduler.by=score and "
                f"overrides.evaluation.every_epochs, or scheduler.kind=none; in {where}"
            )
        return config

    @property
    def extractor_needed(self) -> str | None:
        """The extractor that the metric requires, if any."""
        return self.measured.extractor


def _canonical_keys(keys: dict[Any, Any]) -> dict[Any, Any]:
    """Replace shorthands in keys, also in the conditions of a dimension."""
    renamed = {}
    for key, value in keys.items():
        if isinstance(value, dict) and isinstance(value.get("when"), dict):
            value = value | {"when": {canonical(str(other)): wanted for other, wanted in value["when"].items()}}
        renamed[canonical(key) if isinstance(key, str) else key] = value
    return renamed


def trial_name(study: str, number: int) -> str:
    return f"{study}-{number:04d}"


def _refuse_key(key: str) -> None:
    keys = known_keys()
    field = keys.get(key)
    if field is None:
        raise ValueError(f"unknown key {shown(key)} in space{suggest(key, keys)}; see `glann config --keys`")
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        raise ValueError(f"space.{key} is a section; name one of its keys")
    if has_trait(key, Trait.NOT_SEARCHABLE):
        raise ValueError(f"space.{key} is not a property of a model and cannot be searched; put it in overrides")


def _of_second_stage(key: str) -> bool:
    """Whether a key, or section, may differ between runs that share a stage 1."""
    return key == "seed" or key.split(".")[0] == "sampler" or may_change(key)
