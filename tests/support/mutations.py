"""Hypothesis strategies for documents that somebody has tampered with: valid ones with something changed, and noise."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)
FLOATS = (0.0, -0.0, 0.5, -1.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    ".",
    "..",
    "../outside/sentinel",
    "../../outside/sentinel",
    "/etc/passwd",
    "a/b",
    "C:\\x",
    "x\0y",
    "two\nlines",
    "\ud800",
    "\u202etxt",
    "A" * 3000,
    "0" * 64,
    "f" * 64,
    "step-000001",
    "state.json",
    "generator.safetensors",
    "latents-0-5.safetensors",
    "1",
    "null",
    "s3://bucket/x",
    "http://user:password@host",
)

numbers = st.sampled_from(NUMBERS) | st.integers(-300, 300) | st.integers()
texts = st.sampled_from(TEXTS) | st.text(max_size=12)
leaves = st.none() | st.booleans() | numbers | st.sampled_from(FLOATS) | st.floats() | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=6
)


@st.composite
def changed_trees(draw: st.DrawFn, trees: st.SearchStrategy[Any]) -> Any:
    """Plain data with one to four places replaced, removed, added, copied or moved a little."""
    tree = copy.deepcopy(draw(trees))
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(tree))
        if not places:
            return draw(values)
        node, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(("replace", "nudge", "remove", "add", "copy", "wrap")))
        if change == "replace":
            node[key] = draw(values)
        elif change == "nudge" and isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] += draw(st.sampled_from((-1, 1, 0.5, 2**31, -(2**40))))
        elif change == "remove":
            del node[key]
        elif change == "add" and isinstance(node, dict):
            node[draw(texts)] = draw(values)
        elif change == "copy":
            other, at = draw(st.sampled_from(places))
            node[key] = copy.deepcopy(other[at])
        elif change == "wrap":
            node[key] = [node[key]]
    return tree


def _places(tree: Any) -> Any:
    """(container, key) of every value in plain data."""
    stack = [tree]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            yield node, key
            stack.append(node[key])


@st.composite
def json_texts(draw: st.DrawFn, trees: st.SearchStrategy[Any]) -> bytes:
    """JSON of a tampered tree, at times not quite JSON: a key twice, endless nesting, a number without end, cut off."""
    text = json.dumps(draw(changed_trees(trees) | trees | values))
    kind = draw(st.sampled_from(("whole",) * 6 + ("twice", "deep", "long", "cut", "noise", "bom", "utf16")))
    if kind == "twice" and text.startswith('{"'):
        key = draw(st.sampled_from(sorted(json.loads(text))))
        text = "{" + json.dumps(key) + ": " + json.dumps(draw(values)) + ", " + text[1:]
    elif kind == "deep":
        text = draw(st.sampled_from(("[", '{"a":'))) * draw(st.sampled_from((200, 2000, 100_000)))
    elif kind == "long":
        text = text.replace("1", "1" * draw(st.sampled_from((30, 400, 6000))), 1)
    elif kind == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif kind == "bom":
        return b"\xef\xbb\xbf" + text.encode()
    elif kind == "utf16":
        return text.encode("utf-16")
    return draw(changed_bytes(st.just(text.encode()))) if kind == "noise" else text.encode()


@st.composite
def changed_bytes(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with some overwritten, by numbers that hurt too, cut out, put in, repeated or cut off."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        change = draw(st.sampled_from(("byte", "number", "remove", "insert", "repeat", "cut")))
        if change == "byte" and content:
            content[at] = draw(st.integers(0, 255))
        elif change == "number":
            size, order = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from(("little", "big")))
            number = draw(numbers) % (1 << 8 * size)
            content[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
        elif change == "remove":
            del content[at : at + draw(st.integers(1, 64))]
        elif change == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=32))
        elif change == "repeat":
            content[at:at] = content[at : at + draw(st.sampled_from((1, 30, 46, 512, 1024)))]
        elif change == "cut":
            del content[at:]
    return bytes(content)


def tampered(*contents: bytes) -> st.SearchStrategy[bytes]:
    """One of these files with something changed, or nothing of the kind."""
    return st.one_of(changed_bytes(st.sampled_from(contents)), changed_bytes(st.sampled_from(contents)), st.binary())
