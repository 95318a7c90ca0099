"""Spaces: what is searched stays inside its range, conditions hold, and a grid is every combination, once."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from glann.tuning.ledger import Trial
from glann.tuning.search import suggest
from glann.tuning.space import Dimension, Params, Space, dependencies_first, grid, premises
from glann.tuning.study import StudyConfig
from hypothesis import given, settings
from hypothesis import strategies as st

numbers = st.floats(-1e9, 1e9)
words = st.text(max_size=8)
values = st.none() | st.booleans() | st.integers(-(2**52), 2**52) | numbers | words
# Keys that a study may search; what they mean is nothing to a space.
KEYS = [
    "sampler.noise_dim",
    "sampler.hidden_dim",
    "sampler.lr",
    "sampler.weight_decay",
    "sampler.statistics",
    "sampler.batch_size",
]


@st.composite
def ranges(draw: st.DrawFn, kind: str) -> Dimension:
    whole, log = kind.endswith("integer"), kind.startswith("log_")
    ends = (
        st.integers(1 if log else -(2**52), 2**52) if whole else st.floats(1e-9, 1e9) if log else st.floats(-1e9, 1e9)
    )
    low, high = sorted(draw(st.lists(ends, min_size=2, max_size=2, unique=True)))
    return Dimension.model_validate({kind: [low, high]})


@st.composite
def choices(draw: st.DrawFn, size: int = 5) -> Dimension:
    found = st.lists(values | st.lists(values, max_size=3), min_size=2, max_size=size, unique_by=json.dumps)
    return Dimension.model_validate({"choice": draw(found)})


dimensions = choices() | st.sampled_from(["uniform", "log_uniform", "integer", "log_integer"]).flatmap(ranges)


@st.composite
def spaces(draw: st.DrawFn, small: bool = False) -> Space:
    """Several keys, some of them under conditions on those before."""
    space: Space = {}
    few = st.integers(0, 3).map(lambda low: Dimension.model_validate({"integer": [low, low + 2]}))
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)):
        dimension = draw(few | choices(3)) if small else draw(dimensions)
        when = {}
        for other, known in space.items():
            if known.kind in ("choice", "integer") and draw(st.booleans()):
                allowed = list(known.choice or [known.bounds[0], known.bounds[1]])
                when[other] = draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=2))
        space[key] = Dimension.model_validate(dimension.model_dump(exclude_none=True) | {"when": when})
    order = draw(st.permutations(list(space)))
    return {key: space[key] for key in order}


def study_of(space: Space, kind: str) -> StudyConfig:
    """A study whose space is taken as it is."""
    base = StudyConfig.model_validate(
        {
            "name": "s",
            "recipe": "digits",
            "overrides": {"sampler.kind": "imle"},
            "metric": "fd_lite0",
            "space": {"sampler.lr": {"uniform": [0, 1]}},
            "search": {"kind": kind, "startup": 2},
        }
    )
    return base.model_copy(update={"space": space})


def inside(dimension: Dimension, value: Any) -> bool:
    if dimension.choice is not None:
        return value in dimension.choice
    low, high = dimension.bounds
    whole = isinstance(value, int) if dimension.kind.endswith("integer") else isinstance(value, float)
    return whole and low <= value <= high


@settings(deadline=None)
@given(dimensions, st.data())
def test_what_is_encoded_is_decoded_to_the_same(dimension: Dimension, data: st.DataObject):
    if dimension.choice is not None:
        value = data.draw(st.sampled_from(dimension.choice))
    else:
        low, high = dimension.bounds
        value = data.draw(st.integers(low, high) if isinstance(low, int) else st.floats(low, high))
    encoded = dimension.encode(value)
    assert encoded is not None
    assert dimension.distribution()._contains(dimension.distribution().to_internal_repr(encoded))
    assert dimension.decode(encoded) == value
    assert dimension.encode(json.loads(json.dumps(value))) == encoded  # by way of the ledger


@settings(deadline=None)
@given(dimensions)
def test_what_lies_outside_is_nothing_of_the_dimensions(dimension: Dimension):
    assert dimension.encode({"neither": "this"}) is None
    if dimension.choice is None:
        low, high = dimension.bounds
        assert dimension.encode(low - abs(low) - 1) is None
        assert dimension.encode(high + abs(high) + 1) is None
        assert dimension.encode(math.nan) is None
    if dimension.kind.endswith("integer"):
        assert dimension.encode(dimension.bounds[0] + 0.5) is None


@settings(max_examples=40, deadline=None)
@given(spaces(), st.sampled_from(["random", "tpe"]), st.lists(st.floats(-10, 10), min_size=4, max_size=4))
def test_suggested_values_are_inside_and_conditions_hold(space: Space, kind: str, results: list[float]):
    study, trials = study_of(space, kind), [Trial(0, {}, "finished", 0.0)]
    for result in results:
        params = suggest(study, trials)
        assert params is not None
        for key, value in params.items():
            assert inside(space[key], value), f"{key}={value!r}"
        for key, dimension in space.items():
            met = all(other in params and params[other] in allowed for other, allowed in dimension.conditions().items())
            assert (key in params) == met, f"{key} of {params}"
        trials.append(Trial(len(trials), params, "finished", result))


@settings(deadline=None)
@given(spaces(small=True))
def test_a_grid_is_every_combination_once(space: Space):
    assert sorted(map(text, grid(space))) == sorted(map(text, by_force(space)))


def by_force(space: Space) -> list[Params]:
    """Every combination, thrown together first; keys whose conditions fail are struck out until none is left."""
    found: dict[str, Params] = {}
    whole = {key: range(int(d.bounds[0]), int(d.bounds[1]) + 1) for key, d in space.items() if d.choice is None}
    every = [whole.get(key) or dimension.choice or () for key, dimension in space.items()]
    for combination in itertools.product(*every):
        params = dict(zip(space, combination, strict=True))
        while failed := [
            key
            for key in params
            if not all(o in params and params[o] in allowed for o, allowed in space[key].conditions().items())
        ]:
            for key in failed:
                del params[key]
        found[text(params)] = params
    return list(found.values())


def text(params: Params) -> str:
    return json.dumps(params, sort_keys=True)


@settings(deadline=None)
@given(spaces())
def test_every_key_comes_after_those_it_depends_on(space: Space):
    order = dependencies_first(space)
    assert sorted(order) == sorted(space)
    for key, dimension in space.items():
        assert all(order.index(other) < order.index(key) for other in dimension.conditions())


def test_premises_reach_as_far_as_conditions_do():
    def dimension(**when: Any) -> Dimension:
        return Dimension.model_validate({"integer": [1, 3], "when": when})

    space = {"a": dimension(), "b": dimension(a=2), "c": dimension(b=[3, 1]), "d": dimension(c=1, b=1)}
    assert premises(space, "a") == {}
    assert premises(space, "c") == {"b": 3, "a": 2}
    assert premises(space, "d") == {"c": 1, "b": 1, "a": 2}  # what is asked for directly comes first


def test_premises_of_keys_that_depend_on_all_before_are_found_at_once():
    space: Space = {}
    for number in range(60):
        space[f"k{number}"] = Dimension.model_validate({"integer": [1, 2], "when": dict.fromkeys(space, 1)})
    assert premises(space, "k59") == {f"k{number}": 1 for number in range(59)}


@pytest.mark.parametrize(
    ("dimension", "shares"),
    [({"log_uniform": [1e-4, 1.0]}, (0.25, 0.25)), ({"uniform": [0.0, 1.0]}, (0.001, 0.9))],
)
def test_a_logarithmic_range_is_even_over_orders_of_magnitude(dimension: dict[str, Any], shares: tuple[float, float]):
    study = study_of({"sampler.lr": Dimension.model_validate(dimension)}, "random")
    drawn = [(suggest(study, [Trial(0, {})] * count) or {})["sampler.lr"] for count in range(1, 201)]
    found = (sum(value < 1e-3 for value in drawn) / 200, sum(value > 1e-1 for value in drawn) / 200)
    assert found == pytest.approx(shares, abs=0.1)
