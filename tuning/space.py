"""What a study searches: for each dotted key of the recipe a range or choices, perhaps under a condition.

    glo.latent_lr: {log_uniform: [0.005, 0.1]}
    imle.noise_dim: {integer: [8, 32]}
    generator.kind: {choice: [infogan, resnet]}
    generator.max_width: {choice: [256, 512], when: {generator.kind: resnet}}

A key whose condition does not hold keeps the recipe's value and is no parameter of that trial.
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
MAX_WHOLE = 2**53  # from here on floats, in which samplers reckon, miss whole numbers
Whole = Annotated[int, Field(gt=-MAX_WHOLE, lt=MAX_WHOLE)]


class Dimension(Section):
    """What one key ranges over: exactly one of the kinds."""

    uniform: tuple[float, float] | None = Field(None, description="any number between two")
    log_uniform: tuple[float, float] | None = Field(None, description="as uniform, evenly over orders of magnitude")
    integer: tuple[Whole, Whole] | None = Field(None, description="any whole number between two, both included")
    log_integer: tuple[Whole, Whole] | None = Field(None, description="as integer, evenly over orders of magnitude")
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
                raise ValueError(f"choice is of numbers, words, or short lists of them, not {shown(strange)}")
            texts = [json.dumps(value) for value in self.choice or ()]
            if len(texts) < 2 or len(set(texts)) < len(texts):
                raise ValueError("choice needs at least two values, each once")
        else:
            low, high = self.bounds
            if not low < high:
                raise ValueError(f"{self.kind} goes from the smaller to the larger number, not from {low} to {high}")
            if self.log and low <= 0:
                raise ValueError(f"{self.kind} has orders of magnitude only above zero, and begins at {low}")
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def log(self) -> bool:
        """Whether it is even over orders of magnitude."""
        return self.kind.startswith("log_")

    @property
    def bounds(self) -> tuple[float, float]:
        """Of a range."""
        return getattr(self, self.kind)

    def extremes(self) -> tuple[Any, ...]:
        """The values at which the recipe has to agree: every choice, or both ends of a range."""
        return self.choice if self.choice is not None else self.bounds

    def conditions(self) -> dict[str, list[Any]]:
        """For every key that this one depends on, the values under which it is searched."""
        return {key: list(value) if isinstance(value, list | tuple) else [value] for key, value in self.when.items()}

    def holds(self, params: Params) -> bool:
        """Whether it is searched, given the keys it depends on."""
        return all(key in params and params[key] in allowed for key, allowed in self.conditions().items())

    def distribution(self) -> BaseDistribution:
        """The same for Optuna. Choices are told by their place: Optuna keeps plain values only."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choice is not None:
            return CategoricalDistribution(tuple(range(len(self.choice))))
        low, high = self.bounds
        if self.kind.endswith("integer"):
            return IntDistribution(int(low), int(high), log=self.log)
        return FloatDistribution(low, high, log=self.log)

    def encode(self, value: Any) -> int | float | None:
        """A value as Optuna holds it; None if it is none of the dimension's."""
        if self.choice is not None:
            return next((at for at, choice in enumerate(self.choice) if choice == value), None)
        number = int if self.kind.endswith("integer") else int | float
        inside = isinstance(value, number) and self.bounds[0] <= value <= self.bounds[1]
        return value if inside else None

    def decode(self, encoded: Any) -> Any:
        return self.choice[encoded] if self.choice is not None else encoded


def _plain(value: Any) -> bool:
    """Whether it is what YAML, JSON and Optuna all can hold, and small: a few lines of YAML can stand for gigabytes."""
    if isinstance(value, list):
        return len(value) <= MAX_LIST and not any(isinstance(item, list) or not _plain(item) for item in value)
    if isinstance(value, int):
        return abs(value) < MAX_WHOLE
    return value is None or isinstance(value, float | str)


Space = dict[str, Dimension]


def dependencies_first(space: Space) -> list[str]:
    """The keys in an order in which each comes after those it depends on.

    Raises:
        ValueError: a condition on a key or a value that is not in the space, or a circle.
    """
    for key, dimension in space.items():
        for other, allowed in dimension.conditions().items():
            if other not in space:
                raise ValueError(f"space.{key} depends on {other}, which is not in the space")
            if space[other].kind in CONTINUOUS:
                raise ValueError(f"space.{key} depends on {other}, which is continuous; use choice or integer for it")
            for value in allowed:
                if space[other].encode(value) is None:
                    raise ValueError(f"space.{key} depends on {other}={shown(value)}, which {other} never is")
    ordered: list[str] = []
    while len(ordered) < len(space):
        ready = [key for key in space if key not in ordered and space[key].conditions().keys() <= set(ordered)]
        if not ready:
            circle = ", ".join(sorted(space.keys() - set(ordered)))
            raise ValueError(f"the conditions of {circle} depend on one another in a circle")
        ordered += ready
    return ordered


def premises(space: Space, key: str) -> Params:
    """Values of the keys that a key depends on, also by way of others, under which it is searched."""
    params, open_ends = Params(), [key]
    while open_ends:
        for other, allowed in space[open_ends.pop()].conditions().items():
            if other not in params:
                params[other] = allowed[0]
                open_ends.append(other)
    return params


def grid(space: Space) -> Iterator[Params]:
    """Every combination of the choices and whole numbers, each once.

    Raises:
        ValueError: more than can be listed.
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
