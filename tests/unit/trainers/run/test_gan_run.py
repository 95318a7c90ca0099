"""A whole run of `method: gan` of one worker, in this process and without Ray: measured, stopped, resumed, packaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glann.cluster.checkpoints import lease
from glann.config.run import Config
from glann.datasets.index import Index
from glann.datasets.pack import pack
from glann.inference.package import MANIFEST, load_model, read_manifest
from glann.metrics.evaluate import evaluate
from glann.metrics.features.extractor import EXTRACTORS, ExtractorSpec
from glann.reports.card import write_card
from glann.reports.run_folder import write_config
from glann.storage.open import open_store
from glann.trainers.run.control import Request
from glann.trainers.run.evaluation import Evaluated
from glann.trainers.run.events import EpochDone, Measured, Resumed
from glann.trainers.run.packaging import export_saved, open_checkpoint
from glann.trainers.run.state import load_any
from glann.trainers.run.worker import Stopped, Worker
from torch import nn

ROWS = 60


class Driver:
    """What a worker reports to; it asks for a stop after so many epochs."""

    rank = 0

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Any] = []
        self.stop_after = stop_after

    def send(self, event: Any) -> None:
        self.events.append(event)

    post = send

    def progress(self, event: Any) -> None:
        pass

    def enter(self, phase: str) -> None:
        pass

    def requested(self) -> Request:
        done = sum(isinstance(event, EpochDone) for event in self.events)
        return Request.STOP if done == self.stop_after else Request.NOTHING

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    np.savez(folder / "x.npz", images=np.random.default_rng(0).integers(0, 256, (ROWS, 28, 28, 1), np.uint8))
    pack(str(folder / "x.npz"), str(folder / "data"), resolution=28, channels=1)
    return folder / "data"


@pytest.fixture(scope="module", autouse=True)
def in_process(tmp_path_factory):
    """No lease, and features that need no weights."""
    features = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten())
    made = ExtractorSpec("squeezenet-caffe", 147, lambda *_: features, lambda img: img[:, :1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GLANN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patched.setattr("glann.trainers.run.worker.require", lambda *_: None)
        patched.setitem(EXTRACTORS, "squeezenet", made)
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


def train(config: Config, driver: Driver) -> Driver:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config.run_dir, config)
    Worker(config, driver, torch.device("cpu"), lease.Ticket(1, "a")).run()  # type: ignore[arg-type]
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
    whole = train(straight, Driver())
    epochs = [event.numbers for event in whole.of(EpochDone)]
    assert len(epochs) == 3
    assert {"loss", "generator_loss", "balance", "real_score", "fake_score"} <= epochs[-1].keys()
    assert [(one.stage, one.epoch) for one in whole.of(Measured)] == [("networks", 2), ("networks", 3)]
    [evaluated] = whole.of(Evaluated)
    assert {result.sampler for result in evaluated.results} <= {"own", "real", None}
    assert "fd_squeezenet" in {result.metric for result in evaluated.results}
    assert {"samples", "interpolations", "nearest"} == evaluated.drawn.keys()

    with pytest.raises(Stopped):
        train(cut, Driver(stop_after=1))
    again = train(cut, Driver())
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
