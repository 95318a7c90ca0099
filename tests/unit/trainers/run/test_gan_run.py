"""A whole run of `method: gan` of one worker, in this process and without Ray: measured, stopped, resumed, packaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glann.config.run import Config
from glann.datasets.index import Index
from glann.inference.package import MANIFEST, load_model, read_manifest
from glann.metrics.evaluate import evaluate
from glann.reports.card import write_card
from glann.storage.open import open_store
from glann.trainers.run.control import Request
from glann.trainers.run.evaluation import Evaluated
from glann.trainers.run.events import EpochDone, Measured, Resumed
from glann.trainers.run.packaging import export_saved, open_checkpoint
from glann.trainers.run.state import load_any
from glann.trainers.run.worker import Stopped
from one_worker import Driver, in_one_process, noise_images, worker

ROWS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("images"), ROWS)


@pytest.fixture(scope="module", autouse=True)
def in_process(tmp_path_factory):
    with in_one_process(tmp_path_factory.mktemp("cache")):
        yield


def configured(data: Path, home: Path, name: str) -> Config:
    tree: dict[str, Any] = {
        "method": "gan",
        "data": {"url": str(data), "resolution": 28, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": 4, "width": 4},
        "engine": {"kind": "torch"},
        "networks": {
            "epochs": 3,
            "batch_size": 20,
            "ema": 0.9,
            "objective": {"kind": "began"},
            "critic": {"kind": "autoencoder", "width": 4, "code_dim": 4},
        },
        "sampler": {"kind": "prior", "shape": "uniform"},
        "evaluation": {"samples": 20, "interim_samples": 16, "every_epochs": 2},
        "checkpoint": {"keep": 9, "every_epochs": 1},
        "tracking": {"enabled": False},
    }
    return Config.model_validate({"name": name, "runs_dir": str(home), **tree})


def train(config: Config, stop_after: int | None = None) -> Driver:
    """The driver after the run; it asks for a stop after so many epochs."""

    def at(event: Any) -> None:
        if isinstance(event, EpochDone) and len(driver.of(EpochDone)) == stop_after:
            driver.request = Request.STOP

    driver = Driver(at)
    worker(config, driver).run()
    return driver


def packaged(config: Config, driver: Driver) -> Path:
    """The folder of the packaged model, as the end of a run writes it."""
    [evaluated] = driver.of(Evaluated)
    assert evaluated.gaussian is None
    _, saved = load_any(open_store(config.checkpoint_url, config.s3), evaluated.step)
    index = Index.load(config.data.url, config.s3)
    export_saved(config.run_dir / "model", config, saved, evaluated.gaussian, ROWS, index.fingerprint)
    return config.run_dir / "model"


def test_a_run_is_measured_stopped_resumed_and_packaged_as_if_it_had_not_been(data, tmp_path, monkeypatch):
    straight, cut = configured(data, tmp_path, "straight"), configured(data, tmp_path, "cut")
    whole = train(straight)
    epochs = [event.numbers for event in whole.of(EpochDone)]
    assert len(epochs) == 3
    assert {"loss", "generator_loss", "balance", "real_score", "fake_score"} <= epochs[-1].keys()
    assert [(one.stage, one.epoch) for one in whole.of(Measured)] == [("networks", 2), ("networks", 3)]
    [evaluated] = whole.of(Evaluated)
    assert {result.sampler for result in evaluated.results} <= {"own", "real", None}
    assert "fd_squeezenet" in {result.metric for result in evaluated.results}
    assert {"samples", "interpolations", "nearest"} == evaluated.drawn.keys()

    with pytest.raises(Stopped):
        train(cut, stop_after=1)
    again = train(cut)
    assert again.of(Resumed)
    models = [packaged(config, driver) for config, driver in ((straight, whole), (cut, again))]
    files = [{path.name: path.read_bytes() for path in model.iterdir() if path.name != MANIFEST} for model in models]
    assert files[0].keys() == {"generator.safetensors", "sampler-prior.safetensors"}
    assert files[0] == files[1]

    model = load_model(straight.run_dir)
    images = model.sample(6, seed=1)
    assert np.array_equal(images, open_checkpoint(straight.run_dir, "last").model.sample(6, seed=1))
    assert np.array_equal(images[2:3], model.decode(model.codes(model.noise(torch.tensor([2]), 1))))
    results = evaluate(straight, read_manifest(models[0]), model, step=evaluated.step)
    assert {result.sampler for result in results} <= {"own", "real", None}
    card = write_card(straight.run_dir).read_text()
    assert "adversarial" in card
    assert "| objective | began |" in card
    assert "glo" not in (straight.run_dir / "config.yaml").read_text()
