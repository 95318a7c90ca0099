"""docs/troubleshooting.md quotes what the code says, and explains every fault that is not of the user's making."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import glann
import pytest
from glann.errors import ExitStatus

ROOT = Path(glann.__file__).parent
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"
NOT_OF_THE_PACKAGE = {"tests", "benchmarks", "docs", "build"}
FAULTS = {"EnvironmentFault", "RunStopped"}  # and their subclasses: nothing that was given is wrong


def sources() -> Iterator[ast.Module]:
    for path in sorted(ROOT.rglob("*.py")):
        top = path.relative_to(ROOT).parts[0]
        if top not in NOT_OF_THE_PACKAGE and not top.startswith("."):
            yield ast.parse(path.read_text(encoding="utf-8"))


def template(node: ast.expr) -> str:
    """The text of an expression, with a gap for whatever is known only when it is evaluated."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(template, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left) + template(right)
    return GAP


def texts_and_faults() -> tuple[list[str], list[str]]:
    """All texts in the package, and those that faults are raised with."""
    trees = list(sources())
    kinds = set(FAULTS)
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in kinds for b in node.bases):
                kinds.add(node.name)
    texts, faults = [], []
    for tree in trees:
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in docstrings:
                texts.append(template(node))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
                faults.append(template(node.args[0]))
    return texts, faults


def quotes() -> list[str]:
    """The messages of glann on the page: the first cells of the tables that are headed so."""
    found, ours = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            ours = False
        elif line.startswith("| message of glann |"):
            ours = True
        elif ours and not line.startswith("|---"):
            cell = line.split(" | ")[0].removeprefix("| ").strip("`")
            found += cell.split("`, `")
    return found


def says(text: str, quote: str) -> bool:
    """Whether a message of the code begins or goes on as quoted, gaps standing for anything."""
    pieces = [piece.strip() for piece in quote.split(GAP) if piece.strip()]
    found = all(piece in text for piece in pieces)  # most texts end here
    return found and re.search(".*".join(map(re.escape, pieces)), text, re.DOTALL) is not None


@pytest.fixture(scope="module")
def code() -> tuple[list[str], list[str]]:
    return texts_and_faults()


def test_what_is_quoted_is_what_the_code_says(code: tuple[list[str], list[str]]):
    quoted = quotes()
    assert len(quoted) > 120
    assert [quote for quote in quoted if not any(says(text, quote) for text in code[0])] == []


def test_every_fault_is_explained(code: tuple[list[str], list[str]]):
    """A text of gaps alone comes from elsewhere, where it is a text of its own."""
    quoted = quotes()
    told = [text for text in code[1] if len(text.replace(GAP, "").strip("; ,.:()")) > 12]
    assert len(told) > 40
    assert [text for text in told if not any(says(text, quote) for quote in quoted)] == []


def test_every_exit_status_is_explained():
    statuses = re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(status) for status in statuses] == sorted(ExitStatus)


def test_a_message_that_the_code_does_not_have_is_found():
    assert says("saving step … timed out", "saving step … timed out …")
    assert not says("saving step … was late", "saving step … timed out …")
    assert template(ast.parse("'a ' + f'{b} c'", mode="eval").body) == "a … c"
