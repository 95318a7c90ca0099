"""Data that do not fit a recipe are refused before training; what one command advises, the next one takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from glann.config.sections import DataConfig
from glann.datasets.fit import TRAINABLE, not_trainable, require_fit
from glann.datasets.index import Index
from glann.errors import UserError


def fit(rows: int, workers: int = 1, max_rows: int | None = None) -> int:
    index: Any = SimpleNamespace(rows=rows, resolution=28, channels=1)
    data = DataConfig(url="squares", resolution=28, channels=1, max_rows=max_rows)
    return require_fit(cast(Index, index), data, workers)


@pytest.mark.parametrize(
    ("rows", "max_rows", "said"),
    [
        (1, None, "squares holds 1 image; at least 2 are needed to measure a Fréchet distance; pack more images"),
        (1, 5, "squares holds 1 image; at least 2 are needed to measure a Fréchet distance; pack more images"),
        (
            9,
            1,
            "data.max_rows=1 leaves 1 image; at least 2 are needed .*; set data.max_rows=2",
        ),
    ],
)
def test_one_image_is_refused_with_where_it_comes_from(rows: int, max_rows: int | None, said: str):
    with pytest.raises(UserError, match=f"^{said}"):
        fit(rows, max_rows=max_rows)


def test_fewer_images_than_workers_say_how_many_workers_there_may_be():
    with pytest.raises(
        UserError, match=r"squares gives 3 images, fewer than cluster.workers=4; set cluster.workers=3 "
    ):
        fit(3, workers=4)


def test_as_many_as_are_needed_are_enough():
    assert fit(2) == 2
    assert fit(9, max_rows=4, workers=4) == 4


def test_a_run_of_one_image_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The check is made before the run has a folder, also of `glann train`."""
    import numpy as np
    from glann.config.run import load
    from glann.datasets.pack import pack
    from glann.trainers.run.driver import train
    from rich.console import Console

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    np.savez("one.npz", images=np.zeros((1, 28, 28), np.uint8))
    pack("one.npz", "one", resolution=28, channels=1)
    settings = ["data.url=one", "data.source=null", "cluster.workers=1", "tracking.enabled=false"]
    with pytest.raises(UserError, match="one holds 1 image"):
        train(load("digits", settings), Console(quiet=True))
    assert not Path("runs").exists()


def advice(held, resolution=64):
    data = DataConfig(url="set", resolution=resolution, channels=3)
    with pytest.raises(UserError) as error:
        require_fit(SimpleNamespace(resolution=held, channels=3, rows=9), data, 1)
    return str(error.value)


@pytest.mark.parametrize("held", [held for held in TRAINABLE if held != 64])
def test_a_resolution_is_advised_if_it_can_be_configured(held):
    assert f"set data.resolution={held}, or pack it again" in advice(held)
    DataConfig(url="set", resolution=held)
    assert not not_trainable(held)


def test_a_resolution_that_no_recipe_can_have_is_never_advised():
    message = advice(96)
    assert "set data.resolution" not in message
    assert "images of 96 px cannot be trained on; 28, 32, 64, 128, 256, 512, 1024 px can: pack it again" in message
    assert "--resolution 64" in message
