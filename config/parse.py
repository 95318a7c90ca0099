"""Safe YAML parsing and one-line validation errors; the input is untrusted and may be of any size."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from ..errors import one_line

MAX_YAML, MAX_NESTING = 1 << 20, 100  # characters and open brackets of a recipe; PyYAML slows down superlinearly beyond
MAX_SHOWN = 300  # characters of a value that a message quotes


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without YAML 1.1's dates, base 8 and base 60: `0012` and `12:30:45` stay as typed."""


_DROPPED = {f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "int", "float")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.nan$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)


def plain_data(text: str) -> Any:
    """Parse YAML to plain data. Of scalars, only `null`, booleans and decimal or 0x numbers are no text.

    Raises:
        ValueError: not valid YAML, too large, or not plain data; in one line.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"it has {len(text)} characters, more than {MAX_YAML}")
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}" and depth > 0)
        if depth > MAX_NESTING:
            raise ValueError(f"more than {MAX_NESTING} brackets are open")
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # besides its own errors PyYAML raises those of dates, numbers and deep nesting
        raise ValueError(one_line(error, 500)) from error


def read_value(text: str, annotation: Any) -> Any:
    """The value of an override, as typed where the key takes text, and else as YAML reads it.

    Args:
        annotation: the type of the key; None if there is no such key.
    Raises:
        ValueError: not valid YAML.
    """
    typed = text.strip()
    if typed[:1] not in ("'", '"') and _takes_text(annotation):
        empty = typed == "" or (typed in ("~", "null", "Null", "NULL") and NoneType in get_args(annotation))
        return None if empty else typed
    value = plain_data(text) if typed else None
    return typed if isinstance(value, bool) and bool not in _members(annotation) else value  # `on` is not 1


def _takes_text(annotation: Any) -> bool:
    """Whether every value of a type is text: strings, or the words of a Literal. It may be empty, too."""
    return all(
        all(isinstance(word, str) for word in get_args(member)) if get_origin(member) is Literal else member is str
        for member in _members(annotation)
    )


def _members(annotation: Any) -> list[Any]:
    """The types that a type is a union of, but None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is NoneType else [annotation]


def explain(fault: Any, known: Mapping[str, Any], hidden: Iterable[str] = ()) -> str:
    """The one-line message for an error of pydantic.

    Args:
        known: every dotted key with its field.
        hidden: parts of error locations that are not keys.
    """
    key = ".".join(str(part) for part in fault["loc"] if part not in hidden)[:MAX_SHOWN]
    if fault["type"] == "extra_forbidden":
        section, _, last = key.rpartition(".")
        kinds = [str(part).strip("<>") for part in fault["loc"] if part in hidden]
        if key in known and kinds:  # of a section whose keys depend on its `kind`
            return f"{key} is no key of {section}.kind={kinds[0]}; see `glann config --help`"
        if key in known:
            return f"unknown key '{key}': in a file a key stands in its section, `{section}: {{{last}: ...}}`"
        return f"unknown key {key}{suggest(key, known)}; see `glann config --help`"
    if fault["type"] == "missing":
        field = known.get(key)
        return f"missing key {key}: {(field and field.description) or 'a value is needed'}"
    if fault["type"] == "value_error" and not key:
        return str(fault["ctx"]["error"])
    if fault["type"] == "union_tag_invalid":  # a section whose keys depend on its `kind`
        given = fault["ctx"]["tag"].strip("<>")
        allowed = fault["ctx"]["expected_tags"].replace("<", "").replace(">", "")
        return f"{key}.kind={shown(given)} is not possible: input should be {allowed}"
    if fault["type"] == "union_tag_not_found":
        return f"{key}={shown(fault['input'])} is not possible: input should be a section with keys such as kind"
    prefix = f"{key}={shown(fault['input'])}" if key else shown(fault["input"])
    return f"{prefix} is not possible: {reason(fault)}"


def reason(fault: Any) -> str:
    """Pydantic's message without the names of our classes."""
    if fault["type"] in ("model_type", "model_attributes_type", "dataclass_type"):
        return "keys with values are needed" + (f", not {kind_of(fault['input'])}" if "input" in fault else "")
    if fault["type"] == "string_type":
        return "a value is needed" if fault.get("input", "") is None else "input should be text; put quotes around it"
    allowed = str(fault["msg"]).removeprefix("Value error, ")
    return f"{allowed[0].lower()}{allowed[1:]}"


def kind_of(value: Any) -> str:
    """The kind of a plain value, for messages."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a yes or no"
    words = {int: "a number", float: "a number", str: "text", list: "a list", dict: "keys with values"}
    return words.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """A value shortened for a message, also where YAML aliases expand to billions of items."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, MAX_SHOWN, MAX_SHOWN, MAX_SHOWN
    try:
        return short.repr(value)
    except ValueError:  # Python does not format integers of more than 4,300 digits
        return "a number of too many digits"


def suggest(key: str, known: Iterable[str]) -> str:
    """A hint with the known key closest to `key`, compared as a whole and by the last part; empty if none is close."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1]).ratio()
        return max(whole, 0.99 * last)

    best = max(known, key=likeness)
    return f" (did you mean {best}?)" if likeness(best) >= 0.6 else ""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
