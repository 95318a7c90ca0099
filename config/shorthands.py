"""Shorthand keys of recipes and overrides: `from`, and a kind of sampler as the name of its section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .parse import shown

SHORT_STAGE_ONE = "from"  # `from=RUN` stands for `stage_one=RUN`
SHORTHANDS = {"imle": ("sampler", "kind")}  # `imle.epochs` stands for `sampler.epochs` with `sampler.kind=imle`


def canonical(key: str) -> str:
    """Expand a shorthand key: `imle.epochs` is short for `sampler.epochs`, `from` for `stage_one`."""
    first, dot, rest = key.partition(".")
    if first == SHORT_STAGE_ONE:
        return "stage_one" + dot + rest
    return SHORTHANDS[first][0] + dot + rest if first in SHORTHANDS else key


def with_shorthands(tree: dict[str, Any]) -> dict[str, Any]:
    """Expand `imle: {...}` to `sampler: {kind: imle, ...}`; keys given under both names are merged.

    Raises:
        ValueError: keys of one kind together with a section of another kind.
    """
    tree = dict(tree)
    if SHORT_STAGE_ONE in tree:
        if "stage_one" in tree:
            raise ValueError("from and stage_one are the same key; give one of them")
        tree["stage_one"] = tree.pop(SHORT_STAGE_ONE)
    for kind, (section, discriminator) in SHORTHANDS.items():
        if kind not in tree:
            continue
        short, given = tree.pop(kind), tree.get(section)
        given, short = {} if given is None else given, {} if short is None else short
        if not isinstance(short, dict) or not isinstance(given, dict):
            tree[section] = given or short
            continue
        if (other := given.get(discriminator, kind)) != kind:
            raise ValueError(f"{kind}.* are keys of {section}.kind={kind}, and {section}.kind is {shown(other)}")
        tree[section] = _merged({discriminator: kind, **given}, short)
    return tree


def _merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key for key, value in over.items() if isinstance(value, dict) and isinstance(tree.get(key), dict)}
    return tree | over | {key: _merged(tree[key], over[key]) for key in both}


def kinds_first(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in an order in which a kind drops none of the others."""
    return dict(sorted(keys.items(), key=lambda item: canonical(item[0]) != "sampler.kind"))
