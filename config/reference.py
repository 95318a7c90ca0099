"""Reference of the configuration: every key with its type, default and meaning.

`glann config --keys`, docs/configuration.md and the tables of docs/studies.md are generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from .run import Config, known_keys
from .samplers import SAMPLERS, SamplerConfig

BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Key:
    """One key of the configuration: dotted name, type and bounds, default, meaning."""

    name: str
    kind: str
    default: str
    meaning: str


def describe_keys(section: type[BaseModel] = Config) -> list[Key]:
    """Every key that has a value (no sections), in the order of the models."""
    described = []
    for name, field in known_keys(section).items():
        if _is_section(field.annotation):
            continue
        if name == "sampler.kind":
            described.append(Key(name, " | ".join(SAMPLERS), _default(field), field.description or ""))
        elif section is Config and name.startswith("sampler."):
            described.append(_of_samplers(name))
        else:
            described.append(Key(name, _values(field), _default(field), field.description or ""))
    return described


def _of_samplers(name: str) -> Key:
    """A key that some kinds of samplers have, each with its own default and meaning."""
    fields = {kind: known_keys(model, "sampler.").get(name) for kind, model in SAMPLERS.items()}
    having = {kind: field for kind, field in fields.items() if field is not None}
    defaults = _by_value({kind: _default(field) for kind, field in having.items()})
    meanings = _by_value({kind: field.description or "" for kind, field in having.items()})
    default = next(iter(defaults)) if len(defaults) == 1 else "; ".join(f"{d} ({k})" for d, k in defaults.items())
    meaning = "; ".join(f"{kinds}: {words}" for words, kinds in meanings.items())
    return Key(name, _values(next(iter(having.values()))), default, meaning)


def _by_value(of_kind: dict[str, str]) -> dict[str, str]:
    """Each distinct value with the kinds that have it."""
    grouped: dict[str, list[str]] = {}
    for kind, value in of_kind.items():
        grouped.setdefault(value, []).append(kind)
    return {value: ", ".join(kinds) for value, kinds in grouped.items()}


def _values(field: Any) -> str:
    """Type and bounds of a field."""
    bounds = [f"{sign} {getattr(rule, key)}" for rule in field.metadata for key, sign in BOUNDS if hasattr(rule, key)]
    return " ".join([_kind(field.annotation), *bounds])


def summary(name: str) -> str:
    """The first line of a section's docstring."""
    annotation = Config.model_fields[name].annotation
    section = SamplerConfig if name == "sampler" else annotation
    return (getattr(section, "__doc__", None) or "").strip().splitlines()[0]


def _is_section(annotation: Any) -> bool:
    """Whether an annotation is a section, or a union of sections."""
    if get_origin(annotation) is Annotated:
        return _is_section(get_args(annotation)[0])
    if isinstance(annotation, type):
        return issubclass(annotation, BaseModel)
    return get_origin(annotation) in (Union, UnionType) and all(map(_is_section, get_args(annotation)))


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "empty"
    return yaml.safe_dump(field.default, default_flow_style=True).removesuffix("...\n").strip()


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if annotation is Any:
        return "value"
    if get_origin(annotation) is dict:
        return "keys and values"
    if get_origin(annotation) is tuple:
        return "list of " + _kind(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    parts = [part for part in get_args(annotation) if part is not NoneType]
    return " | ".join(_kind(part) for part in parts) if parts else annotation.__name__
