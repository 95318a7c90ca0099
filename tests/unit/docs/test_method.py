"""The script of docs/method.md runs in an empty folder, its losses fall, and what it draws are digits of all kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from doc_blocks import code_blocks
from PIL import Image
from sklearn.datasets import load_digits

PAGE = Path(__file__).parents[3] / "docs" / "method.md"
# What follows the script in the same process, to look at what it has made.
SEEN = """
import numpy
torch.manual_seed(1)
random = build_generator(GeneratorConfig(kind="infogan", latent_dim=D, width=16), resolution=28, channels=1)
untrained = SamplingModel(random, model.samplers)
numpy.savez("seen.npz", real=img_N1HW[:, 0], glo=glo_losses, imle=imle_losses,
            samples=model.sample(300, seed=1)[..., 0], untrained=untrained.sample(100, seed=1)[..., 0],
            picture=grid(model.sample(100, seed=0)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the script has run."""
    folder = tmp_path_factory.mktemp("empty")
    (script,) = code_blocks(PAGE)
    (folder / "method.py").write_text(script + SEEN)
    # One thread: on a machine that does other work several would wait for one another.
    done = subprocess.run(
        [sys.executable, "method.py"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "IMLE  epoch 100  loss" in done.stdout
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "seen.npz") as arrays:
        return dict(arrays)


def nearest(images_NHW: np.ndarray, real_MHW: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over images in [0, 1] of the L1 distance a pixel to the nearest real one, and which one that is."""
    a, b = images_NHW.reshape(len(images_NHW), -1), real_MHW.reshape(len(real_MHW), -1)
    distance_NM = np.stack([np.abs(b - image).mean(1) for image in a])
    return float(distance_NM.min(1).mean()), distance_NM.argmin(1)


def test_it_is_short():
    (script,) = code_blocks(PAGE)
    assert len(script.splitlines()) <= 62


def test_both_losses_fall(seen: dict[str, np.ndarray]):
    assert seen["glo"][-1] < 0.02 < 0.15 < seen["glo"][0]
    assert seen["imle"][-1] < 0.5 * seen["imle"][0]


def test_the_picture_is_there(folder: Path, seen: dict[str, np.ndarray]):
    assert np.array_equal(np.asarray(Image.open(folder / "samples.png")), seen["picture"])


def test_samples_are_digits_of_every_kind_and_no_copies(seen: dict[str, np.ndarray]):
    real, samples = seen["real"], seen["samples"] / 255
    distance, which = nearest(samples, real)
    assert distance < 0.3 * nearest(seen["untrained"] / 255, real)[0]
    others = [nearest(real[row : row + 1], np.delete(real, row, 0))[0] for row in range(0, len(real), 20)]
    assert 0.5 * np.mean(others) < distance < 1.5 * np.mean(others)  # as far from digits as digits from one another
    shares = np.bincount(load_digits().target[which], minlength=10) / len(which)
    assert shares.min() > 0.03
    assert len(np.unique(which)) > 0.6 * len(which)  # not a few images over and over
