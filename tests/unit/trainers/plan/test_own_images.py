"""`glann train own-images data.url=...` runs on what is there: any size, number of images and machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.config.parse import flatten
from glann.config.run import require_trainable
from glann.datasets.pack import pack
from glann.errors import UserError
from glann.trainers.plan import own_images
from glann.trainers.plan.estimate import count_rows
from glann.trainers.plan.own_images import load_recipe
from glann.trainers.run.preflight import may_change


@pytest.fixture
def packed(tmp_path):
    """Packs so many images of a size; returns the override with their address."""

    def pack_images(count: int, side: int, channels: int) -> str:
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "x.npz", images=rng.integers(0, 256, (count, side, side, channels), np.uint8))
        pack(str(tmp_path / "x.npz"), str(tmp_path / "data"), resolution=side, channels=channels)
        return f"data.url={tmp_path / 'data'}"

    return pack_images


@pytest.mark.parametrize(("count", "side", "channels"), [(3, 28, 1), (40, 64, 3), (17, 128, 3)])
def test_the_recipe_fits_the_images(packed, count: int, side: int, channels: int):
    config = load_recipe("own-images", [packed(count, side, channels)])
    assert (config.data.resolution, config.data.channels) == (side, channels)
    assert config.generator.kind == ("infogan" if side <= 64 else "resnet")
    assert 2 <= config.glo.batch_size <= max(2, count)
    assert config.evaluation.extractor != "inception", "which has to be fetched from elsewhere"
    assert count_rows(config).count == count


@pytest.mark.parametrize("side", [28, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("rows", [2, 400, 30_000, 100_000_000])
def test_every_size_and_number_is_possible(side: int, rows: int):
    fitted = own_images.for_images(side, 3, rows)
    config = own_images.load("own-images", changes=fitted | own_images.for_machine(2))
    require_trainable(config)
    assert 25 <= config.glo.epochs <= 300
    assert config.glo.batch_size <= max(2, rows)


def test_what_is_given_counts(packed):
    config = load_recipe(
        "own-images", [packed(40, 32, 1), "glo.epochs=3", "cluster.workers=2", "engine.kind=deepspeed"]
    )
    assert (config.glo.epochs, config.cluster.workers, config.engine.kind) == (3, 2, "deepspeed")


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_a_machine_decides_no_number(packed, monkeypatch, gpus: int):
    """A run that began on another machine is resumed: only keys that may change differ."""
    url = packed(40, 32, 1)
    here = flatten(load_recipe("own-images", [url]).model_dump())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = load_recipe("own-images", [url])
    assert (config.cluster.workers, config.cluster.gpus_per_worker) == (min(2, max(gpus, 1)), min(gpus, 1))
    there = flatten(config.model_dump())
    assert all(may_change(key) for key in here if here[key] != there[key])


def test_without_images_or_for_a_cluster_it_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no data set at .*nowhere"):
        load_recipe("own-images", [f"data.url={tmp_path}/nowhere"])
    with pytest.raises(UserError, match=r"glann config own-images data\.url=\.\.\. > mine\.yaml"):
        load_recipe("own-images", here=False)
