"""Configuration of a comparison: methods that are trained and measured alike, on one data set and with one budget.

name: compare-samplers
recipe: digits                                  of every method that names no other
overrides: {cluster.workers: 2}                 dotted keys of the recipe that all methods share
methods:
  imle: {}
  mixture: {sampler.kind: gmm}
  vgg: {recipe: digits-vgg, glo.epochs: 10}     a method is a recipe and overrides, so it can be any run
seeds: [0, 1, 2]
budget_minutes: 6

The data, the workers and what is measured are those of `recipe` and of this file for every method. Methods that differ
in nothing but their sampler share stage 1: the first of them trains it, once per seed, and the others start from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ...config.address import LocalPath
from ...config.parse import explain, kind_of, plain_data, shown, suggest
from ...config.paths import absolute
from ...config.run import COMPARISONS, RECIPES, Config, find_recipe, known_keys, load, load_tree
from ...config.section import Section
from ...config.sections import EvaluationConfig
from ...config.shorthands import canonical, kinds_first
from ...errors import UserError
from ...storage.files import read_document
from ...trainers.run.stage_one import stage_one_differences

FILE = "comparison.yaml"
SHARED = ("data", "s3", "cluster", "tracking")  # sections that every method has from the recipe of the comparison
OWN = ("name", "seed", "runs_dir", "stage_one", "evaluation")  # keys that the comparison sets
MEASURED: dict[str, Any] = {"extractor": "lite0-96", "metrics": ["kid", "prd", "coverage", "codes"], "samples": 2000}
METHOD_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
RECIPE = "recipe"  # the key of a method that is not one of a recipe


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: a method with a seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"


class Published(Section):
    """Distances that others have published, which are shown apart and never ranked with what was measured here."""

    source: str = Field(min_length=1, description="who has published these distances, and how they were measured")
    figures: dict[str, float] = Field(min_length=1, description="published Frechet distance by the name of its method")


class Comparison(Section):
    """Configuration of a comparison."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$",
        description="name of the comparison; its folder is studies_dir/name",
    )
    studies_dir: LocalPath = Field("studies", description="parent of the folders of comparisons and studies")
    recipe: str = Field(description="recipe of the methods that name no other: a name, or a YAML file")
    overrides: dict[str, Any] = Field({}, description="dotted keys of the recipe that all methods share")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1, description="overrides of each method by its name; the key `recipe` gives it another recipe"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="seeds that every method is trained with")
    budget_minutes: float | None = Field(
        None,
        gt=0,
        description="minutes that a run may train, with its stage 1 if that is shared; one that needs more fails",
    )
    evaluation: EvaluationConfig = Field(
        EvaluationConfig.model_validate(MEASURED), description="what is measured, of every method"
    )
    ratio: tuple[str, str] | None = Field(
        None, description="two methods: the last line is the distance of the first over that of the second"
    )

    published: tuple[Published, ...] = Field(
        (), description="distances that others have published, shown below the table with their source"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, tree: object) -> object:
        """Complete `evaluation` by the defaults of a comparison, and allow `imle:` for `imle: {}`."""
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        if isinstance(given := tree.get("evaluation", {}), dict):
            tree["evaluation"] = MEASURED | given
        if isinstance(methods := tree.get("methods"), dict):
            tree["methods"] = {name: {} if keys is None else keys for name, keys in methods.items()}
        return tree

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise ValueError("seeds are different numbers from 0 on")
        return seeds

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for method, keys in self.methods.items():
            if not re.fullmatch(METHOD_NAME, method):
                raise ValueError(
                    f"methods has the name {shown(method)}; use letters, digits, dots and dashes, at most 40 in all"
                )
            _refuse_set_keys(f"methods.{method}", [key for key in keys if key != RECIPE], (*SHARED, *OWN))
        _refuse_set_keys("overrides", list(self.overrides), OWN)
        for method in self.ratio or ():
            if method not in self.methods:
                raise ValueError(
                    f"ratio names {shown(method)}, which is none of the methods{suggest(method, self.methods)}"
                )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.studies_dir) / self.name

    def cells(self) -> Iterator[Cell]:
        """The runs in their order: seed by seed, and the first method of a stage 1 before the others."""
        for seed in self.seeds:
            for method in self.methods:
                yield Cell(method, seed)

    def base(self) -> Config:
        """The recipe of the comparison as a run that is named after it. Raises UserError: it is invalid."""
        given = self.overrides | {"evaluation": self.evaluation.model_dump(mode="json")}
        return load(self.recipe, changes=kinds_first(given) | {"name": self.name, "runs_dir": str(self.studies_dir)})

    def run(self, cell: Cell) -> Config:
        """The configuration of a run.

        Raises:
            UserError: the method is invalid; it is named.
        """
        config = self._whole(cell)
        source = self.stage_ones[cell.method]
        if source == cell.method:
            return config
        shared = self._whole(Cell(source, cell.seed))
        return config.model_copy(update={"stage_one": str(shared.run_dir)})

    @cached_property
    def stage_ones(self) -> dict[str, str]:
        """The method whose stage 1 each method takes over: the first one that trains the same; else itself."""
        found: dict[str, str] = {}
        configs = {method: self._whole(Cell(method, self.seeds[0])) for method in self.methods}
        for method, config in configs.items():
            same = (other for other in found.values() if not stage_one_differences(configs[other], config))
            found[method] = next(same, method) if config.has_codes else method
        return found

    def _whole(self, cell: Cell) -> Config:
        """A run with both its stages."""
        keys = dict(self.methods[cell.method])
        changes: dict[str, Any] = {}
        if (recipe := keys.pop(RECIPE, None)) is not None:
            tree = load_tree(find_recipe(self.recipe))
            changes = {section: tree.get(section, {}) for section in SHARED}
        changes |= kinds_first(self.overrides) | kinds_first(keys)
        changes |= {
            "name": f"{self.name}-{cell.method}-{cell.seed}",
            "runs_dir": str(self.folder / "runs"),
            "seed": cell.seed,
            "evaluation": self.evaluation.model_dump(mode="json"),
        }
        try:
            return load(recipe or self.recipe, changes=changes)
        except UserError as error:
            raise UserError(f"method {cell.method}: {error}") from error

    def with_absolute_paths(self) -> Self:
        """The same comparison with absolute paths."""
        methods = {
            name: keys | ({RECIPE: str(find_recipe(keys[RECIPE]).absolute())} if RECIPE in keys else {})
            for name, keys in self.methods.items()
        }
        here = {"studies_dir": absolute(self.studies_dir), "recipe": str(find_recipe(self.recipe).absolute())}
        evaluation = self.evaluation.model_copy(
            update={"data": self.evaluation.data and absolute(self.evaluation.data)}
        )
        return self.model_copy(update=here | {"methods": methods, "evaluation": evaluation})

    def to_yaml(self) -> str:
        tree = self.model_dump(mode="json", exclude_defaults=True)
        tree["evaluation"] = self.evaluation.model_dump(mode="json")  # its defaults are others than a recipe's
        return yaml.safe_dump(tree, sort_keys=False)


def _refuse_set_keys(where: str, keys: list[str], refused: tuple[str, ...]) -> None:
    known = known_keys()
    for key in keys:
        full = canonical(str(key))
        if full not in known:
            raise ValueError(
                f"{where} has the unknown key {shown(key)}{suggest(full, known)}; see `glann config --keys`"
            )
        if full.split(".")[0] in refused:
            instead = (
                "its own key of the comparison" if full.startswith("evaluation") else "overrides of the comparison"
            )
            raise ValueError(f"{where}.{key} is the same for all methods of a comparison; give it in {instead}")


def load_comparison(file: str | Path) -> Comparison:
    """Load a comparison from a YAML file, or a bundled one by name.

    Raises:
        UserError: one line per fault; also if a method is invalid.
    """
    path = _find(file)
    try:
        comparison = parse_comparison(read_document(path))
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; in {path}") from error
    comparison.base()
    _ = comparison.stage_ones  # every method once
    return comparison


def parse_comparison(data: bytes) -> Comparison:
    """Raises ValueError where it is not a comparison, in one line per fault."""
    tree = plain_data(data.decode())
    if not isinstance(tree, dict):
        raise ValueError(f"it holds {kind_of(tree)} where keys such as `recipe:` and `methods:` are needed")
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        faults = [explain(fault, known_keys(Comparison)) for fault in error.errors(include_url=False)[:10]]
        raise ValueError("\n       ".join(faults)) from error


def _find(file: str | Path) -> Path:
    path = Path(file)
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml").removeprefix(COMPARISONS)
    bundled = RECIPES / f"{COMPARISONS}{stem}.yaml"
    if path.parent.as_posix() in (".", "configs") and bundled.is_file():
        return bundled
    names = ", ".join(sorted(file.stem for file in RECIPES.glob(f"{COMPARISONS}*.yaml")))
    raise UserError(f"no such comparison: {file} (give a YAML file, or one of: {names})")
