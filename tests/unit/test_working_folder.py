"""`python -m glann` and what it starts import nothing from the working folder; tests/e2e has the workers of a run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from glann.cluster.jobs.shipping import PACKAGE, package_files

NAMES = ("profile", "statistics", "token", "random", "yaml", "numpy", "torch", "ray")


@pytest.mark.parametrize("words", [["--help"], ["config", "digits"], ["doctor"]])
def test_a_script_beside_is_not_taken_for_a_module(words: list[str], tmp_path: Path):
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')")
    command = [sys.executable, "-m", "glann", *words]
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONSAFEPATH", "RAY_ADDRESS")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "was imported" not in done.stdout + done.stderr
    assert done.returncode in ((0, 1) if words == ["doctor"] else (0,)), done.stderr


def test_every_python_that_is_started_leaves_it_out():
    """`python -c` and `python -m` put the working folder first: a command says -P, or runs in a folder of its own."""
    started = [
        (path.as_posix(), ast.unparse(node.elts[1]))
        for path in package_files()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.List) and len(node.elts) > 1 and ast.unparse(node.elts[0]) == "sys.executable"
    ]
    assert len(started) >= 3
    own_folder = {"datasets/assets/downloads.py"}  # `run` gives it the folder of the download
    assert [place for place, option in started if option != "'-P'" and place not in own_folder] == []
