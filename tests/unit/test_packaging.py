"""The wheel, the folder that a submitted job ships and the Docker image hold the same files of the package.

A room that one of them forgets is found here, and not by a job on a cluster.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import glann
import pytest
from glann.cluster.jobs import shipping

ROOT = Path(glann.__file__).parent


def tracked() -> list[str]:
    """The files of a clone, with those that are not committed yet."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this is no clone: git does not list its files")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def sent_to_the_builder(names: list[str]) -> list[str]:
    """What Docker sends of these files: `*` leaves all out, `!name` takes a file or folder of the root back in."""
    lines = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    taken = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    return [name for name in names if any(fnmatch(name.split("/")[0], pattern) for pattern in taken)]


def files_of_the_wheel(names: list[str], folder: Path) -> set[str]:
    """Build the wheel of a copy of these files; what it holds below glann/."""
    source, out = folder / "source", folder / "out"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        inside = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert all(name.startswith("glann/") for name in inside), inside
    return {name.removeprefix("glann/") for name in inside}


@pytest.fixture(scope="module")
def shipped() -> set[str]:
    return {path.as_posix() for path in shipping.package_files()}


def test_the_wheel_holds_what_a_job_ships(shipped: set[str], tmp_path: Path):
    assert files_of_the_wheel(tracked(), tmp_path) == shipped
    assert {"__init__.py", "py.typed", "configs/digits.yaml", "trainers/run/driver.py"} <= shipped
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) or name == "setup.py" for name in shipped)


def test_the_image_holds_what_a_job_ships(shipped: set[str], tmp_path: Path):
    assert files_of_the_wheel(sent_to_the_builder(tracked()), tmp_path) == shipped
