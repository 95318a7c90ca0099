"""`make test` runs files in several processes, but never two tests at once that fill the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TEST = """
import os, time
from pathlib import Path

def test_it():
    log = Path({log!r})
    started = time.monotonic()
    time.sleep(0.3)
    worker, threads = os.environ["PYTEST_XDIST_WORKER"], os.environ.get("OMP_NUM_THREADS")
    with log.open("a") as file:
        file.write(f"{name} {{worker}} {{started}} {{time.monotonic()}} {{threads}}\\n")
"""


def test_every_folder_of_tests_is_collected(pytestconfig: pytest.Config):
    """pytest leaves out some names by default, `dist` among them, unless they are given on the command line."""
    root = CONFTEST.parent
    folders = {part for file in root.rglob("test_*.py") for part in file.relative_to(root).parts[:-1]}
    assert folders >= {"dist", "e2e", "unit"}
    left_out = pytestconfig.getini("norecursedirs")
    assert [folder for folder in folders if any(fnmatch(folder, pattern) for pattern in left_out)] == []


def test_tests_that_fill_the_machine_run_one_after_the_other_beside_the_rest(tmp_path: Path):
    log = tmp_path / "log"
    for name in ("e2e/test_a", "e2e/test_b", "netns/test_c", "unit/test_d", "unit/test_e", "unit/test_f"):
        file = tmp_path / "tests" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TEST.format(log=str(log), name=name))
    shutil.copy(CONFTEST, tmp_path / "tests")
    command = [sys.executable, "-m", "pytest", "-n", "2", "--import-mode=importlib", "-p", "no:cacheprovider", "tests"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "OMP_"))}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed in" in done.stdout.splitlines()[-1]
    ran = [line.split() for line in log.read_text().splitlines()]
    assert {threads for *_, threads in ran} == {"1"}
    assert {worker for _, worker, *_ in ran} == {"gw0", "gw1"}
    alone = sorted((float(began), float(ended)) for name, _, began, ended, _ in ran if not name.startswith("unit/"))
    assert len(alone) == 3
    assert all(ended <= began for (_, ended), (began, _) in pairwise(alone))
    assert {"e2e/test_a"} < {name for name, *_ in sorted(ran, key=lambda line: float(line[2]))[:2]}, "they begin first"
