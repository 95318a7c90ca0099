"""Safe YAML parsing and one-line validation errors; the input is untrusted and may be of any size."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ..errors import one_line

MAX_YAML, MAX_NESTING = 1 << 20, 100  # characters and open brackets of a recipe; PyYAML slows down superlinearly beyond
MAX_SHOWN = 300  # characters of a value that a message quotes


def plain_data(text: str) -> Any:
    """Parse YAML to plain data.

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
        return yaml.safe_load(text)
    except Exception as error:  # besides its own errors PyYAML raises those of dates, numbers and deep nesting
        raise ValueError(one_line(error, 500)) from error


def explain(fault: Any, known: Mapping[str, Any], hidden: Iterable[str] = ()) -> str:
    """The one-line message for an error of pydantic.

    Args:
        known: every dotted key with its field.
        hidden: parts of error locations that are not keys.
    """
    key = ".".join(str(part) for part in fault["loc"] if part not in hidden)[:MAX_SHOWN]
    if fault["type"] == "extra_forbidden":
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
