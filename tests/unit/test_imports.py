"""The house stays a house: imports only point down, heavy libraries stay in their rooms, nothing unsafe is called.

The sources are parsed, not imported, so a rule cannot be dodged by importing inside a function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import glann
import pytest

ROOT = Path(glann.__file__).parent
FLOORS = {
    "config": 0,
    "errors": 0,
    "faults": 0,
    "reference": 0,
    "models": 1,
    "datasets": 2,
    "metrics": 2,
    "cluster": 3,
    "tracking": 4,
    "trainers": 5,
    "tuning": 6,
    "cli_table": 6,
    "cli_data": 7,
    "cli_jobs": 7,
    "cli_leave": 7,
    "cli_tune": 7,
    "cli_registry": 7,
    "cli": 8,
    "__main__": 9,
}
GROUND = {"config", "errors", "faults", "reference"}
ROOMS = [name for name in FLOORS if (ROOT / name).is_dir()]
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
HOMES = {
    "ray": ("cluster/", "trainers/", "tuning/"),
    "deepspeed": ("trainers/engine.py",),
    "mlflow": ("tracking/", "tuning/"),
    "boto3": ("datasets/s3.py",),
    "botocore": ("datasets/s3.py",),
}
LOADED_BY_PATH = {"tracking/pyfunc.py"}  # MLflow runs this file on its own, outside the package
MAX_LINES, MAX_FUNCTION_LINES = 400, 60


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """(line, level, dotted names) of every import: level 0 is absolute, 1 this room, 2 the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield node.lineno, 0, [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield node.lineno, node.level, names


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted name of what is called, as far as it is plain."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_there_is_something_to_check():
    assert len(SOURCES) > 10
    assert {named(path).split("/")[0].removesuffix(".py") for path in SOURCES} <= {*FLOORS, "__init__"}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_inside_the_package_are_relative_and_point_down(path: Path):
    inside = path.parent != ROOT
    own = path.parent.relative_to(ROOT).parts[0] if inside else path.stem
    for line, level, names in imports(path):
        if level == 0:
            if named(path) not in LOADED_BY_PATH:
                assert not any(name.split(".")[0] == "glann" for name in names), f"{named(path)}:{line}: be relative"
                continue
            names = [name.removeprefix("glann.") for name in names if name.startswith("glann.")]
        elif inside and level == 1:
            continue  # the same room
        for name in names:
            other = name.split(".")[0]
            if other in FLOORS:  # what is left is `from . import __version__`
                assert FLOORS[other] < FLOORS[own] or other == own or {other, own} <= GROUND, (
                    f"{named(path)}:{line}: {own} (floor {FLOORS[own]}) must not know {other} (floor {FLOORS[other]})"
                )


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_heavy_libraries_stay_in_their_rooms(path: Path):
    for line, level, names in imports(path):
        for name in names if level == 0 else ():
            homes = HOMES.get(name.split(".")[0])
            assert homes is None or named(path).startswith(homes), f"{named(path)}:{line}: {name} belongs in {homes}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_nothing_that_could_run_foreign_code_is_called(path: Path):
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "os.system", "compile"}
    for call, name in calls(path):
        assert name not in forbidden, f"{named(path)}:{call.lineno}: {name} on what may come from outside"
        if name == "torch.load":
            safe = [key for key in call.keywords if key.arg == "weights_only" and ast.unparse(key.value) == "True"]
            assert safe, f"{named(path)}:{call.lineno}: torch.load without weights_only=True"
        if name.startswith("subprocess."):
            shells = [key for key in call.keywords if key.arg == "shell"]
            assert not shells, f"{named(path)}:{call.lineno}: a shell"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_files_and_functions_can_be_read_in_one_go(path: Path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{named(path)} does not say what it is for"
    assert len(text.splitlines()) < MAX_LINES, f"{named(path)} is too long"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            docstring = ast.get_docstring(node, clean=False) or ""
            length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert length < MAX_FUNCTION_LINES, f"{named(path)}:{node.lineno}: {node.name} has {length} lines"
