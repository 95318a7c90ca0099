"""The Python code of a page of docs/, and the package with what a page adds to it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

WHERE = re.compile(r"# (?P<file>[\w/]+\.py)(?:, (?:below (?P<below>\w+)|in place of `(?P<line>[^`]+)`))?\n")


def code_blocks(page: Path) -> list[str]:
    """The code of its ```python blocks."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def extend_package(package: Path, page: Path) -> list[str]:
    """Put every block of the page where its first line says: a new file, or a place in one that is there.

    Returns:
        The files that were written, in the order of the page.
    """
    written = []
    for block in code_blocks(page):
        where = WHERE.match(block)
        assert where, f"this block of {page.name} does not say which file it belongs to:\n{block[:200]}"
        file, code = package / where["file"], block[where.end() :]
        assert file.exists() == (where["below"] is not None or where["line"] is not None), where.group()
        if where["below"]:
            code = with_code_below(file.read_text(encoding="utf-8"), where["below"], code)
        elif where["line"]:
            code = with_line(file.read_text(encoding="utf-8"), where["line"], code)
        file.write_text(code, encoding="utf-8")
        written.append(where["file"])
    return written


def with_code_below(source: str, name: str, code: str) -> str:
    """A module with code below what it calls `name` at its top level."""
    ends = [node.end_lineno for node in ast.parse(source).body if name in names_of(node)]
    assert len(ends) == 1, f"{name} is there {len(ends)} times"
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: ends[0]], "\n\n", code, "\n\n", *lines[ends[0] :]])


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def with_line(source: str, begin: str, line: str) -> str:
    """A module with a line in place of the only one that begins like this."""
    lines = source.splitlines(keepends=True)
    (at,) = (at for at, held in enumerate(lines) if held.strip().startswith(begin))
    return "".join([*lines[:at], line, *lines[at + 1 :]])
