"""What `glann sample` writes is what the model makes, in memory that does not grow with the number of images."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from glann.cli import main as cli
from glann.cli.saving import save_images
from glann.errors import EnvironmentFault
from glann.reports.pictures import GAP
from glann.tracking import source
from PIL import Image

STREAM = """
import sys
from pathlib import Path
import numpy as np
from glann.cli.saving import save_images
from glann.reports.pictures import whole_grid  # imported before the memory is measured
from PIL import Image

BATCH, SIDE, COUNT = 8, 512, 400

def batches():
    image = np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(1, SIDE, SIDE, 3)
    for start in range(0, COUNT, BATCH):
        yield np.repeat(image, BATCH, 0)

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
save_images(batches(), COUNT, Path(sys.argv[1]))
print((peak() - before) >> 10)
"""


@pytest.mark.parametrize("out", ["x.npz", "folder"])
def test_memory_does_not_grow_with_the_number_of_images(out, tmp_path):
    """400 images of 512 px are 300 MiB; a batch is 6. At 1024 px 10,000 images are 31 GB."""
    words = [sys.executable, "-c", STREAM, str(tmp_path / out)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, done.stdout
    if out == "folder":
        assert len(list((tmp_path / out).iterdir())) == 400
        return
    images = np.load(tmp_path / out)["images"]
    assert (images.shape, images.dtype) == ((400, 512, 512, 3), np.uint8)
    assert (images[399].ravel()[:300] == np.arange(300) % 256).all()


def drawn(count: int, side: int, channels: int = 3, batch: int = 4):
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)
    return images, (images[start : start + batch] for start in range(0, count, batch))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_holds_the_same_pixels(channels, tmp_path):
    for out in ("x.npz", "folder", "x.png"):
        images, batches = drawn(7, 300, channels)
        save_images(batches, 7, tmp_path / out)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["images"], images)
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(7)]
    for file, image in zip(files, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)).reshape(image.shape), image)
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    part = grid[GAP : GAP + 300, 2 * GAP + 300 : 2 * GAP + 600]
    np.testing.assert_array_equal(part, np.broadcast_to(images[1], (300, 300, 3)))


def test_a_disk_that_fills_up_is_one_line_in_every_form(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("glann.storage.files.os.replace", full)
    for out in ("x.npz", "folder", "x.png"):
        _, batches = drawn(3, 8)
        with pytest.raises(EnvironmentFault, match="disk full while writing"):
            save_images(batches, 3, tmp_path / out)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("side", "made"), [(256, "samples.png"), (512, "samples")])
def test_samples_of_large_models_go_to_a_folder_by_default(side, made, tmp_path, monkeypatch, capsys):
    def stream(n, seed, truncation, sampler):
        yield np.zeros((n, side, side, 3), np.uint8)

    model = SimpleNamespace(resolution=side, channels=3, stream=stream)
    monkeypatch.setattr(source, "load_model", lambda source, s3, device: model)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["sample", "runs/x", "--n", "3"])
    assert not caught.value.code
    assert [path.name for path in Path.cwd().iterdir()] == [made]
    assert capsys.readouterr().out == f"3 images of {side} px: {made}\n"
