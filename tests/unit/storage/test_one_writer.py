"""Protects what is read back later from being torn: a whole local file is written by `storage.files.write_whole` alone.

The sources are parsed. A name that writes or renames files stands in the list below with its reason, or not at all.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import glann
import pytest

ROOT = Path(glann.__file__).parent
NOT_PACKAGE = ("tests", "docs", "benchmarks", "deploy")
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] not in NOT_PACKAGE and not path.relative_to(ROOT).parts[0].startswith(".")
)
# Functions that write a file, or rename one, by the last part of their name.
WRITERS = {
    "write_text",
    "write_bytes",
    "savez",
    "savez_compressed",
    "save_file",
    "savetxt",
    "tofile",
    "NamedTemporaryFile",
}
DOTTED = {"os.replace", "os.rename", "os.renames", "shutil.move", "shutil.copyfile", "shutil.copy", "shutil.copy2"}
DOTTED |= {"json.dump", "pickle.dump", "torch.save", "np.save"}
# file: {what it calls: how often}, and why that is no whole file that is read back later.
ALLOWED: dict[str, tuple[dict[str, int], str]] = {
    "storage/files.py": ({"os.replace": 1, "os.rename": 5, "open(wb)": 1}, "the one writer itself"),
    "tracking/connection.py": ({"os.replace": 1}, "a database that MLflow has made under another name"),
    "tracking/copies.py": ({"os.replace": 1}, "a whole database, set aside under another name"),
    "datasets/assets/catalogue.py": ({"replace": 1}, "a file or folder from a scratch folder, synced before"),
    "datasets/assets/downloads.py": ({"write_text": 1, "open(wb)": 2}, "in a scratch folder"),
    "datasets/assets/converters.py": (
        {"write_bytes": 1, "savez_compressed": 4, "shutil.move": 1},
        "in a scratch folder",
    ),
    "datasets/shards.py": ({"open(wb)": 1}, "a shard that grows in a scratch folder, then goes to a store"),
    "trainers/run/preflight.py": ({"open(w)": 1}, "an empty file to be locked"),
    "cluster/jobs/shipping.py": ({"write_text": 3, "shutil.copyfile": 1}, "in a scratch folder, which is uploaded"),
    "cluster/jobs/versions.py": ({"shutil.copyfile": 1}, "in a scratch folder, which is uploaded"),
}


def writes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What of a source writes or renames files, with the line."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if name in DOTTED:
            yield name, node.lineno
        elif last in WRITERS:
            yield last, node.lineno
        elif last == "open":
            # open(path, mode), or path.open(mode)
            at = 0 if isinstance(node.func, ast.Attribute) and name not in ("io.open", "os.open") else 1
            modes = [*node.args[at : at + 1], *(word.value for word in node.keywords if word.arg == "mode")]
            for mode in modes:
                if isinstance(mode, ast.Constant) and isinstance(mode.value, str) and {*mode.value} & {"w", "x"}:
                    yield f"open({mode.value.replace('x', 'w')})", node.lineno
        elif last in ("replace", "rename") and "." in name and len(node.args) == 1 and not node.keywords:
            yield last, node.lineno  # of a path; text takes two


def test_the_writers_are_found():
    source = """
path.write_text(x); os.replace(a, b); open(p, "w"); p.open("wb"); open(p, mode="x"); p.rename(q); p.replace(q)
text.replace("a", "b"); open(p); p.open("r"); open(p, "ab"); replace(trial, seconds=1); os.open(p, os.O_RDONLY)
with open(f"w", "rb") as file: pass
"""
    found = [what for what, _ in writes(ast.parse(source))]
    assert found == ["write_text", "os.replace", "open(w)", "open(wb)", "open(w)", "rename", "replace"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_whole_files_are_written_by_one_function(path: Path):
    where = path.relative_to(ROOT).as_posix()
    found: dict[str, list[int]] = {}
    for what, line in writes(ast.parse(path.read_text(encoding="utf-8"))):
        found.setdefault(what, []).append(line)
    allowed, _ = ALLOWED.get(where, ({}, ""))
    for what, lines in found.items():
        assert len(lines) == allowed.get(what, 0), (
            f"{where}:{lines[-1]}: {what} may leave half a file; use storage.files.write_whole or replacing_folder"
        )
    assert {*allowed} <= {*found}, f"{where} does not write what it is allowed to any more; shorten the list"


def test_the_list_names_files_that_there_are():
    assert {*ALLOWED} <= {path.relative_to(ROOT).as_posix() for path in SOURCES}
