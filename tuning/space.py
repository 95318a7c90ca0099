"""Search space of a study: a range or choices for each dotted key of the recipe, optionally under a condition.

    glo.latent_lr: {log_uniform: [0.005, 0.1]}
    imle.noise_dim: {integer: [8, 32]}
    generator.kind: {choice: [infogan, resnet]}
    generator.max_width: {choice: [256, 512], when: {generator.kind: resnet}}

A key whose condition does not hold keeps the recipe's value and is not a parameter of that trial.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from ..config.parse import shown
from ..config.section import Section

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Params = dict[str, Any]
KINDS = ("uniform", "log_uniform", "integer", "log_integer", "choice")
CONTINUOUS = ("uniform", "log_uniform")
MAX_GRID, MAX_CHOICES, MAX_LIST = 100_000, 1000, 100
MAX_WHOLE = 2**53  # above it, float64 (used by the samplers) does not represent every integer
Whole = Annotated[int, Field(gt=-MAX_WHOLE, lt=MAX_WHOLE)]


class Dimension(Section):
    """Range or choices of one key; exactly one kind is given."""

    uniform: tuple[float, float] | None = Field(None, description="any number between two bounds")
    log_uniform: tuple[float, float] | None = Field(None, description="as uniform, on a logarithmic scale")
    integer: tuple[Whole, Whole] | None = Field(None, description="any integer between two bounds, both included")
    log_integer: tuple[Whole, Whole] | None = Field(None, description="as integer, on a logarithmic scale")
    choice: tuple[Any, ...] | None = Field(None, max_length=MAX_CHOICES, description="one of these values")
    when: dict[str, Any] = Field({}, description="keys of the space, and the value (or list of values) they must have")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}" + (f", not {' and '.join(given)}" if given else ""))
        never = next((key for key, allowed in self.conditions().items() if not allowed), None)
        if never is not None:
            raise ValueError(f"when.{never} is an empty list, so it is never searched")
        if self.kind == "choice":
            strange = next((value for value in self.choice or () if not _plain(value)), None)
            if strange is not None:
                raise ValueError(f"choice takes numbers, strings, or short lists of them, not {shown(strange)}")
            texts = [json.dumps(value) for value in self.choice or ()]
            if len(texts) < 2 or len(set(texts)) < len(texts):
                raise ValueError("choice needs at least two distinct values")
        else:
            low, high = self.bounds
            if not low < high:
                raise ValueError(f"{self.kind} needs the smaller bound first, not {low} before {high}")
            if self.log and low <= 0:
                raise ValueError(f"{self.kind} needs bounds above zero, and begins at {low}")
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def log(self) -> bool:
        """Whether the scale is logarithmic."""
        return self.kind.startswith("log_")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of a range."""
        return getattr(self, self.kind)

    def extremes(self) -> tuple[Any, ...]:
        """The values to validate against the recipe: every choice, or both ends of a range."""
        return self.choice if self.choice is not None else self.bounds

    def conditions(self) -> dict[str, list[Any]]:
        """The keys that this one depends on, each with the values under which it is searched."""
        return {key: list(value) if isinstance(value, list | tuple) else [value] for key, value in self.when.items()}

    def holds(self, params: Params) -> bool:
        """Whether the key is searched, given the values of the keys it depends on."""
        return all(key in params and params[key] in allowed for key, allowed in self.conditions().items())

    def distribution(self) -> BaseDistribution:
        """The distribution for Optuna. Choices are given by index: Optuna accepts only plain values."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choice is not None:
            return CategoricalDistribution(tuple(range(len(self.choice))))
        low, high = self.bounds
        if self.kind.endswith("integer"):
            return IntDistribution(int(low), int(high), log=self.log)
        return FloatDistribution(low, high, log=self.log)

    def encode(self, value: Any) -> int | float | None:
        """A value in Optuna's encoding; None if it lies outside the dimension."""
        if self.choice is not None:
            return next((at for at, choice in enumerate(self.choice) if choice == value), None)
        number = int if self.kind.endswith("integer") else int | float
        inside = isinstance(value, number) and self.bounds[0] <= value <= self.bounds[1]
        return value if inside else None

    def decode(self, encoded: Any) -> Any:
        """The value behind one of Optuna's."""
        return self.choice[encoded] if self.choice is not None else encoded


def _plain(value: object) -> bool:
    """Whether YAML, JSON and Optuna can all represent the value, and it is small (YAML aliases can expand to GBs)."""
    if isinstance(value, list):
        return len(value) <= MAX_LIST and not any(isinstance(item, list) or not _plain(item) for item in value)
    if isinstance(value, int):
        return abs(value) < MAX_WHOLE
    return value is None or isinstance(value, float | str)


Space = dict[str, Dimension]


def dependencies_first(space: Space) -> list[str]:
    """The keys in topological order: each after those it depends on.

    Raises:
        ValueError: a condition on a key or a value that is not in the space, or a cycle.
    """
    for key, dimension in space.items():
        for other, allowed in dimension.conditions().items():
            if other not in space:
                raise ValueError(f"space.{key} depends on {other}, which is not in the space")
            if space[other].kind in CONTINUOUS:
                raise ValueError(f"space.{key} depends on {other}, which is continuous; use choice or integer for it")
            for value in allowed:
                if space[other].encode(value) is None:
                    raise ValueError(f"space.{key} depends on {other}={shown(value)}, which {other} never takes")
    ordered: list[str] = []
    while len(ordered) < len(space):
        ready = [key for key in space if key not in ordered and space[key].conditions().keys() <= set(ordered)]
        if not ready:
            cycle = ", ".join(sorted(space.keys() - set(ordered)))
            raise ValueError(f"the conditions of {cycle} form a cycle")
        ordered += ready
    return ordered


def premises(space: Space, key: str) -> Params:
    """Values of the keys that a key depends on, directly or indirectly, under which it is searched."""
    params, pending = Params(), [key]
    while pending:
        for other, allowed in space[pending.pop()].conditions().items():
            if other not in params:
                params[other] = allowed[0]
                pending.append(other)
    return params


def grid(space: Space) -> Iterator[Params]:
    """Every distinct combination of the choices and integers.

    Raises:
        ValueError: more than `MAX_GRID` combinations.
    """
    keys = dependencies_first(space)
    values = [_all_values(space[key]) for key in keys]
    if math.prod(map(len, values)) > MAX_GRID:
        raise ValueError(f"the grid has more than {MAX_GRID} combinations; use fewer choices, or search.kind=tpe")
    seen: set[str] = set()
    for combination in itertools.product(*values):
        params: Params = {}
        for key, value in zip(keys, combination, strict=True):
            if space[key].holds(params):
                params[key] = value
        text = json.dumps(params, sort_keys=True)
        if text not in seen:
            seen.add(text)
            yield params


def _all_values(dimension: Dimension) -> Sequence[Any]:
    if dimension.choice is not None:
        return dimension.choice
    low, high = dimension.bounds
    return range(int(low), int(high) + 1)
