"""What every fuzz test shares: how many cases there are, a jail whose surroundings are watched, and the verdict.

    make fuzz                          10,000 cases, new ones every time
    GLANN_FUZZ_CASES=500 pytest tests/fuzz

Without the variable a few hundred cases run, the same ones every time.
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from glann.errors import GlannError
from hypothesis import HealthCheck, Phase, settings

CASES = int(os.environ.get("GLANN_FUZZ_CASES", "0"))
FEW = 480
SHRINK = "GLANN_FUZZ_SHRINK" in os.environ  # takes minutes, and what was found fails without it too
MEMORY = 3 << 30  # bytes that a test may take on top of what the process has: more is a bomb that went off
SLOW = timedelta(seconds=30)  # of one case, which takes milliseconds; a busy machine is no hang
LONGEST_MESSAGE = 20_000
RAN: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Share the cases out evenly over the readers."""
    fuzzed = [item for item in items if hasattr(getattr(item, "function", None), "hypothesis")]
    fuzzed = [item for item in fuzzed if "jail" in item.fixturenames]  # type: ignore[attr-defined]
    share = -(-(CASES or FEW) // max(1, len(fuzzed)))
    for item in fuzzed:
        inner: Any = item.function  # type: ignore[attr-defined]
        settings(
            max_examples=share,
            deadline=SLOW,
            derandomize=not CASES,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate) + ((Phase.shrink,) if SHRINK else ()),
        )(inner)


class Jail:
    """A folder for hostile files, between files that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root, self.inside = root, root / "inside"
        self.name = ""
        for place in ("outside", "cwd", "inside"):
            (root / place).mkdir()
        for place in ("outside/sentinel", "cwd/sentinel", "sentinel"):
            (root / place).write_text("untouched")
        self.around = self._look()

    def fill(self, files: dict[str, bytes]) -> Path:
        """The folder with exactly these files."""
        for path in sorted(self.inside.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, content in files.items():
            path = self.inside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self.inside

    def read(self, reader: Callable[[], Any], *also: type[Exception]) -> bool:
        """Whether the reader took it. It may refuse in its own words, and may do nothing else.

        Args:
            also: errors that the reader's callers expect of it and explain.
        """
        RAN[self.name] += 1
        try:
            reader()
        except (GlannError, *also) as error:
            message = str(error)
            assert message.strip()
            assert len(message) < LONGEST_MESSAGE
            return False
        finally:
            assert self._look() == self.around, "something was written outside"
        return True

    def _look(self) -> dict[str, tuple[int, int, int]]:
        """Everything around the inside: name -> kind, size, time of the last change."""
        found = {}
        for place in (self.root, self.root / "outside", self.root / "cwd"):
            for entry in os.scandir(place):
                if entry.name != "inside":
                    status = entry.stat(follow_symlinks=False)
                    changed = 0 if entry.is_dir(follow_symlinks=False) else status.st_mtime_ns
                    found[entry.path] = (status.st_mode, status.st_size if changed else 0, changed)
        return found


@pytest.fixture(scope="module")
def _jail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jail]:
    jail = Jail(tmp_path_factory.mktemp("jail"))
    before = os.getcwd()
    os.chdir(jail.root / "cwd")
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    yield jail
    resource.setrlimit(resource.RLIMIT_AS, limits)
    os.chdir(before)


@pytest.fixture
def jail(_jail: Jail, request: pytest.FixtureRequest) -> Jail:
    _jail.name = request.node.name
    return _jail


@pytest.fixture(scope="module")
def cases() -> int:
    """How many cases are asked for; 0: a few."""
    return CASES


@pytest.fixture(scope="module")
def ran() -> Counter[str]:
    """The cases that ran, by name."""
    return RAN


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if RAN:
        told = ", ".join(f"{name.removeprefix('test_')} {count}" for name, count in sorted(RAN.items()))
        terminalreporter.write_line(f"fuzz: {RAN.total()} cases ({told})")
