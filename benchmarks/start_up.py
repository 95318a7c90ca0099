"""Seconds until a command answers, against the aims.

python benchmarks/start_up.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Row, least, machine, report

GLANN = str(Path(sys.executable).with_name("glann"))
AIMS = {("--help",): 0.3, ("registry", "list"): 2.0}  # seconds, on a warm machine


def rows(repeats: int = 3) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        make_registry(folder)
        sides = {command: lambda command=command: answer(command, folder) for command in AIMS}
        taken = least(sides, repeats)
    return [Row(f"glann {' '.join(command)}", "aim", aim, taken[command], "s") for command, aim in AIMS.items()]


def make_registry(folder: str) -> None:
    """A database with one registered model, as `glann` finds it in that folder."""
    code = "import mlflow; c = mlflow.MlflowClient('sqlite:///mlflow.db'); c.create_registered_model('digits')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)


def answer(command: tuple[str, ...], folder: str) -> None:
    subprocess.run([GLANN, *command], cwd=folder, check=True, capture_output=True)


def main() -> None:
    report(rows(), machine())


if __name__ == "__main__":
    main()
