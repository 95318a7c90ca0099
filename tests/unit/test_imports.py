"""The house stays a house: imports only point down and never in a circle, heavy libraries stay in their rooms,
nothing unsafe is called.

The sources are parsed, not imported, so a rule cannot be dodged by importing inside a function.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import glann
import pytest

ROOT = Path(glann.__file__).parent
# From the ground up. Files and nested rooms belong to the floor of the folder, or file, of the root that they lie in.
FLOORS = (
    ("errors",),
    ("config",),
    ("storage",),
    ("models",),
    ("datasets",),
    ("cluster",),
    ("samplers",),
    ("inference",),
    ("metrics",),
    ("reports",),
    ("tracking",),
    ("trainers",),
    ("tuning",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = [name for name in FLOOR if (ROOT / name).is_dir()]
SOURCES = sorted(
    [
        *(ROOT / name for name in ("__init__.py", "__main__.py", "errors.py")),
        *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
    ]
)
HOMES = {
    "ray": ("cluster/", "trainers/", "tuning/", "cli/jobs.py"),
    "deepspeed": ("trainers/engine/",),
    "mlflow": ("tracking/", "tuning/"),
    "boto3": ("storage/s3.py",),
    "botocore": ("storage/s3.py",),
}
RAY_PRIVATE = "cluster/nodes/ray_private.py"
# An underscore anywhere in a dotted name, and modules that are not of the public API; also in text, such as a script.
PRIVATE_IN_RAY = re.compile(
    r"\bray(?:\.\w+)*\.(?:_\w+|core\b|dashboard\b|autoscaler\b)"
    r"|\b_raylet\b|_AutoscalingCoordinatorActor|print_to_stdstream|_server_ray_version|\b_do_request\b"
)
LOADED_BY_PATH = {"tracking/registry/pyfunc.py"}  # MLflow runs this file on its own, outside the package
MAX_LINES, MAX_FUNCTION_LINES = 400, 60


class Import(NamedTuple):
    """An import of one name; `module` is absolute, and without `glann.` where it is ours."""

    line: int
    module: str
    ours: bool
    relative: bool


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    """The module of a file: `trainers.run.driver`; a folder's `__init__` is the folder, the root's is empty."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in SOURCES}


def resolve(package: str, level: int, module: str | None, name: str) -> str:
    """The module that `from <level dots><module> import <name>` in a file of `package` reads.

    Raises:
        ValueError: it has more dots than there are folders.
    """
    above = package.split(".") if package else []
    if level - 1 > len(above):
        raise ValueError(f"{level} dots lead out of the package")
    base = [*above[: len(above) - level + 1], *(module.split(".") if module else [])]
    whole = ".".join([*base, name])
    return whole if whole in MODULES else ".".join(base)


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, also those inside functions and for the type checker."""
    module = dotted(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                yield Import(node.lineno, rest if first == "glann" else alias.name, first == "glann", False)
        elif isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                yield Import(node.lineno, resolve(package, node.level, node.module, alias.name), True, True)
        elif isinstance(node, ast.ImportFrom):
            first, _, rest = (node.module or "").partition(".")
            for alias in node.names:
                ours = first == "glann"
                yield Import(node.lineno, resolve("", 1, rest, alias.name) if ours else node.module or "", ours, False)


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """The strongly connected parts of more than one node (Tarjan 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(tuple(sorted(part)))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


def graph_of_files() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        graph[module] |= {found.module for found in imports(path) if found.ours and found.module in MODULES} - {module}
    graph.pop("", None)  # the public face of the package, which knows all rooms
    return {module: known - {""} for module, known in graph.items()}


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted name of what is called, as far as it is plain."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_there_is_something_to_check(capsys):
    assert len(SOURCES) > 10
    assert {module.split(".")[0] for module in MODULES} <= {*FLOOR, ""}
    with capsys.disabled():
        print("\n" + "\n".join(f"  {floor:2}  {', '.join(rooms)}" for floor, rooms in reversed([*enumerate(FLOORS)])))


def test_newcomers_find_every_room_on_its_floor():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = [(int(floor), room) for floor, room in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)]
    assert listed == [(floor, room) for floor, rooms in reversed([*enumerate(FLOORS)]) for room in rooms]


def test_names_are_resolved_from_the_room_they_stand_in():
    """Two dots in a nested room are one room up, not the package's root."""
    assert resolve("trainers.run", 2, "glo", "train_glo") == "trainers.glo"
    assert resolve("trainers.run", 3, "errors", "UserError") == "errors"
    assert resolve("trainers", 2, None, "errors") == "errors"
    assert resolve("trainers", 1, None, "glo") == "trainers.glo"
    with pytest.raises(ValueError, match="lead out"):
        resolve("trainers", 3, "errors", "UserError")


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [("b", "c")]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_file_knows_one_that_knows_it():
    assert circles(graph_of_files()) == []


def test_nested_rooms_of_a_room_do_not_know_one_another_in_a_circle():
    graph: dict[str, set[str]] = defaultdict(set)
    for module, known in graph_of_files().items():
        room = ".".join(module.split(".")[:2])
        graph[room] |= {".".join(other.split(".")[:2]) for other in known if other.split(".")[0] == room.split(".")[0]}
    nested = {room for room in graph if (ROOT / room.replace(".", "/")).is_dir()}
    rooms = {room: {other for other in known if other in nested} - {room} for room, known in graph.items()}
    assert not circles({room: known for room, known in rooms.items() if room in nested})


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_inside_the_package_are_relative_and_point_down(path: Path):
    own = dotted(path).split(".")[0]
    for found in imports(path):
        if not found.ours:
            continue
        where = f"{named(path)}:{found.line}"
        assert found.relative or named(path) in LOADED_BY_PATH, f"{where}: be relative"
        other = found.module.split(".")[0]
        if other in ("", own) or own == "":
            continue  # `from . import __version__`; the same room
        assert FLOOR[other] < FLOOR[own], (
            f"{where}: {own} (floor {FLOOR[own]}) must not know {other} (floor {FLOOR[other]})"
        )


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_heavy_libraries_stay_in_their_rooms(path: Path):
    for found in imports(path):
        homes = None if found.ours else HOMES.get(found.module.split(".")[0])
        assert homes is None or named(path).startswith(homes), (
            f"{named(path)}:{found.line}: {found.module} belongs in {homes}"
        )


def private_in_ray(text: str) -> Iterator[tuple[int, str]]:
    """Lines and names of what is private in Ray, written out or imported."""
    for line, words in enumerate(text.splitlines(), 1):
        yield from ((line, found.group()) for found in PRIVATE_IN_RAY.finditer(words))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "ray":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names if PRIVATE_IN_RAY.search(name))


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("from ray._private.state import state", True),
        ("from ray import _raylet", True),
        ("from ray.train.v2._internal.exceptions import X", True),
        ("from ray.core.generated import autoscaler_pb2", True),
        ("import ray.dashboard.modules.job.sdk", True),
        ("PROBE = 'import ray; print(ray._private.state)'", True),
        ("client._server_ray_version", True),
        ("import ray; ray._raylet.x()", True),
        ("from ray.job_submission import JobDetails", False),
        ("from ..nodes.ray_private import server_version", False),
        ("array._x, ray.exceptions.RayError", False),
    ],
)
def test_private_names_of_ray_are_recognised(text: str, private: bool):
    assert bool(list(private_in_ray(text))) == private


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_private_names_of_ray_stay_in_one_file(path: Path):
    found = list(private_in_ray(path.read_text(encoding="utf-8")))
    if named(path) == RAY_PRIVATE:
        assert found, "there is something to keep in one file"
        return
    assert not found, f"{named(path)}:{found[0][0]}: {found[0][1]} is private in Ray and belongs in {RAY_PRIVATE}"


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
