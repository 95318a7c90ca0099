"""The folder that a command is given in may hold any scripts: no process of a run imports them.

Ray puts the working folder in front of the standard library on its workers' path. There a user's `profile.py` takes the
place of Python's, and the scripts of a stranger's folder would run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RECIPE = """
name: tiny
data: {url: noise, resolution: 28, channels: 1, threads: 1}
generator: {kind: infogan, latent_dim: 8, width: 4}
loss: {kind: l1}
glo: {epochs: 1, batch_size: 8}
imle: {epochs: 1, batch_size: 8, noise_dim: 4}
engine: {kind: torch}
cluster: {workers: 1}
preview: {images: 4}
evaluation: {extractor: squeezenet, samples: 16}
tracking: {enabled: false}
"""
SCRIPT = """
import os
with open({mark!r}, "a") as mark:
    mark.write(f"{{__name__}} in process {{os.getpid()}}\\n")
raise RuntimeError(f"{{__file__}} was imported")
"""
LIMIT_S = 120  # the tiny run takes half a minute; Ray gives up after ten
PACKAGES = ("numpy", "torch", "ray", "glann", "scipy", "PIL", "yaml", "grpc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe and its data."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    np.savez(tmp_path / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (8, 28, 28), np.uint8))
    packed = command(tmp_path, "data", "pack", "noise.npz", "noise", "--resolution", "28", "--channels", "1")
    assert packed.returncode == 0, packed.stderr
    return tmp_path


def command(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user gives it: `python -m` would put the working folder on its path itself."""
    words = (str(Path(sys.executable).with_name("glann")), *words)
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its Ray
        out, err = process.communicate()
        pytest.fail(f"{' '.join(words)} took over {LIMIT_S} s\n{out}\n{err}")
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.timeout(300)
def test_no_process_of_a_run_imports_from_the_working_folder(folder: Path):
    """Scripts with the names of every module of the standard library, and of packages: none leaves its mark."""
    mark = folder / "mark"
    names = {name for name in sys.stdlib_module_names if not name.startswith("_")}
    for name in names | {*PACKAGES}:
        (folder / f"{name}.py").write_text(SCRIPT.format(mark=str(mark)))
    done = command(folder, "train", "tiny.yaml")
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (folder / "runs" / "tiny" / "report.html").exists()


@pytest.mark.timeout(300)
def test_a_bug_in_the_start_of_the_workers_is_reported_at_once(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """One line and the status of a bug: not retried as a lost node, and the name of the run is free again."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('default_worker' in word for word in sys.orig_argv):\n"
        "    sys.modules['profile'] = type(sys)('profile')  # has no `run`, which cProfile looks up when imported\n"
    )
    done = command(folder, "train", "tiny.yaml", PYTHONPATH=str(site))
    assert done.returncode == 70, f"{done.stdout}\n{done.stderr}"
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: unexpected AttributeError: module 'profile' has no attribute 'run'"), line
    assert "starting the workers again" not in done.stdout
    assert not (folder / "runs" / "tiny").exists()
