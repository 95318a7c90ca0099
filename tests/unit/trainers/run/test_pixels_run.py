"""A whole run of `method: imle-pixels` of one worker, in this process and without Ray, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from glann.cluster.checkpoints import reader, retention
from glann.config.run import Config
from glann.datasets.index import Index
from glann.inference.package import load_model
from glann.reports.card import write_card
from glann.storage.open import open_store
from glann.trainers.run.control import Request
from glann.trainers.run.evaluation import Evaluated
from glann.trainers.run.events import EpochDone
from glann.trainers.run.packaging import export_saved
from glann.trainers.run.state import load_any
from glann.trainers.run.worker import Stopped
from one_worker import Driver, in_one_process, noise_images, worker

ROWS = 60


def configured(data: Path, home: Path, name: str) -> Config:
    tree: dict[str, Any] = {
        "method": "imle-pixels",
        "data": {"url": str(data), "resolution": 28, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": 4, "width": 4},
        "engine": {"kind": "torch"},
        "loss": {"kind": "l2"},
        "pixels": {"epochs": 3, "batch_size": 20},
        "sampler": {"kind": "prior"},
        "evaluation": {"samples": 20, "interim_samples": 16},
        "tracking": {"enabled": False},
    }
    return Config.model_validate({"name": name, "runs_dir": str(home), **tree})


def train(config: Config, stops: bool = False) -> Driver:
    def at(event: Any) -> None:
        if isinstance(event, EpochDone) and stops:
            driver.request = Request.STOP

    driver = Driver(at)
    worker(config, driver).run()
    return driver


def test_a_run_ends_as_if_it_had_not_been_stopped(tmp_path):
    data = noise_images(tmp_path, ROWS)
    straight, cut = configured(data, tmp_path, "straight"), configured(data, tmp_path, "cut")
    ends = []
    with in_one_process(tmp_path / "cache"):
        whole = train(straight)
        with pytest.raises(Stopped):
            train(cut, stops=True)
        train(cut)
        for config in (straight, cut):
            store = open_store(config.checkpoint_url, config.s3)
            end = retention.latest(store)
            ends.append((load_any(store, end)[1], reader.load_rows(store, end, range(ROWS))["z"]))
        [evaluated] = whole.of(Evaluated)
        fingerprint = Index.load(straight.data.url, straight.s3).fingerprint
        export_saved(straight.run_dir / "model", straight, ends[0][0], evaluated.gaussian, ROWS, fingerprint)
        model = load_model(straight.run_dir)
    weights = [saved.networks["generator"]["weights"] for saved, _ in ends]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert np.array_equal(ends[0][1], ends[1][1])
    assert "distance" in whole.of(EpochDone)[0].numbers
    assert "fd_squeezenet" in {result.metric for result in evaluated.results}
    assert model.sample(3, seed=1).shape == (3, 28, 28, 1)
    assert "Implicit Maximum Likelihood" in write_card(straight.run_dir).read_text()
