"""A whole run of `method: autoencoder` of one worker, in this process and without Ray: its samplers are fitted to the
encoder's codes, it is measured, stopped and resumed, and another run starts from its stage 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glann.cluster.checkpoints import reader, retention
from glann.config.run import Config
from glann.datasets.index import Index
from glann.errors import UserError
from glann.inference.package import MANIFEST, load_model, read_manifest
from glann.metrics.evaluate import evaluate
from glann.reports.card import write_card
from glann.storage.open import open_store
from glann.trainers.run import stage_one
from glann.trainers.run.control import Request
from glann.trainers.run.evaluation import Evaluated
from glann.trainers.run.events import EpochDone, Measured, Preview, Resumed
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


def configured(data: Path, home: Path, name: str, **sampler: Any) -> Config:
    tree: dict[str, Any] = {
        "method": "autoencoder",
        "data": {"url": str(data), "resolution": 28, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": 4, "width": 4},
        "engine": {"kind": "torch"},
        "loss": {"kind": "bernoulli"},
        "autoencoder": {"epochs": 3, "batch_size": 20},
        "sampler": sampler or {"kind": "ot", "epochs": 2, "steps": 3},
        "evaluation": {"samples": 20, "interim_samples": 16, "every_epochs": 2},
        "checkpoint": {"keep": 9, "every_epochs": 1},
        "preview": {"every_epochs": 3},
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
    _, saved = load_any(open_store(config.checkpoint_url, config.s3), evaluated.step)
    index = Index.load(config.data.url, config.s3)
    export_saved(config.run_dir / "model", config, saved, evaluated.gaussian, ROWS, index.fingerprint)
    return config.run_dir / "model"


def test_a_run_is_measured_stopped_resumed_and_packaged_as_if_it_had_not_been(data, tmp_path):
    straight, cut = configured(data, tmp_path, "straight"), configured(data, tmp_path, "cut")
    whole = train(straight)
    epochs = [event.numbers for event in whole.of(EpochDone)]
    assert [{"reconstruction", "kl"} <= numbers.keys() for numbers in epochs] == [True] * 3 + [False] * 2
    measured = [(one.stage, one.epoch) for one in whole.of(Measured)]
    assert measured == [("autoencoder", 2), ("autoencoder", 3), ("ot", 2)]
    shown = [event for event in whole.of(Preview) if event.stage == "autoencoder"]
    assert [(event.epoch, sorted(event.pictures)) for event in shown] == [(3, ["reconstructions", "samples"])]
    [evaluated] = whole.of(Evaluated)
    assert {result.sampler for result in evaluated.results} <= {"own", "gaussian", "reconstruction", "real", None}
    assert {"l1", "fd_squeezenet"} <= {result.metric for result in evaluated.results}

    for epochs_more in (2, 1):  # within stage 1, and in front of stage 2
        with pytest.raises(Stopped):
            train(cut, stop_after=epochs_more)
    again = train(cut)
    assert again.of(Resumed)
    models = [packaged(config, driver) for config, driver in ((straight, whole), (cut, again))]
    files = [{path.name: path.read_bytes() for path in model.iterdir() if path.name != MANIFEST} for model in models]
    assert files[0].keys() == {"generator.safetensors", "sampler-ot.safetensors", "sampler-gaussian.safetensors"}
    assert files[0] == files[1]

    model = load_model(straight.run_dir)
    assert np.array_equal(model.sample(6, seed=1), open_checkpoint(straight.run_dir, "last").model.sample(6, seed=1))
    results = evaluate(straight, read_manifest(models[0]), model, step=evaluated.step)
    assert {(r.metric, r.sampler) for r in results} >= {("fd_squeezenet", "own"), ("fd_squeezenet", "gaussian")}
    card = write_card(straight.run_dir).read_text()
    assert "variational autoencoder" in card
    assert "| reconstruction loss | bernoulli |" in card
    assert "glo:" not in (straight.run_dir / "config.yaml").read_text()


def test_codes_are_not_projected_on_their_way_to_an_image(data, tmp_path):
    """An encoder's codes have any norm: those of the Gaussian that is fitted to them, too."""
    config = configured(data, tmp_path, "free", kind="gaussian")
    model = load_model(packaged(config, train(config)).parent)
    norms = model.codes(model.noise(torch.arange(50), 0)).norm(dim=1)
    assert ((norms - 1).abs() > 0.1).all()
    assert read_manifest(config.run_dir / "model").constraint == "none"


def test_a_vae_draws_its_codes_from_its_prior(data, tmp_path):
    config = configured(data, tmp_path, "vae", kind="prior")
    model = load_model(packaged(config, train(config)).parent)
    e_BD = model.noise(torch.arange(5), 0)
    assert torch.equal(model.codes(e_BD), e_BD)


def test_another_sampler_is_fitted_to_the_same_codes(data, tmp_path):
    """A two-stage VAE from the finished stage 1 of a run: `from=`."""
    first = configured(data, tmp_path, "first", kind="prior")
    train(first)
    second = configured(data, tmp_path, "second", kind="gmm", components=2)
    second = second.model_copy(update={"stage_one": str(first.run_dir)})
    second.run_dir.mkdir(parents=True)
    store = open_store(second.checkpoint_url, second.s3)
    stage_one.start_from(second, Index.load(second.data.url, second.s3), store, lambda: None)
    done = train(second)
    assert {event.stage for event in done.of(EpochDone)} == {"gmm"}
    stores = [open_store(config.checkpoint_url, config.s3) for config in (first, second)]
    ends = [retention.latest(store) for store in stores]
    generators = [
        load_any(store, end)[1].networks["generator"]["weights"] for store, end in zip(stores, ends, strict=True)
    ]
    assert all(torch.equal(generators[0][name], generators[1][name]) for name in generators[0])
    codes = [reader.load_rows(store, end, range(ROWS))["z"] for store, end in zip(stores, ends, strict=True)]
    assert np.array_equal(*codes)


def refined(data: Path, home: Path, name: str, **changes: Any) -> Config:
    """A run of AE-OT-GAN with the stages of `configured` before the last."""
    before = configured(data, home, name)
    tree = before.model_dump(mode="json") | {"method": "ae-ot-gan", "loss": {"kind": "l2"}}
    tree["autoencoder"]["kl"] = 0
    tree["networks"] = {"epochs": 2, "batch_size": 20, "content": 1.0, "critic": {"width": 4}}
    return Config.model_validate(tree | changes)


def test_a_refined_run_ends_alike_when_it_is_cut_and_shows_curves_and_a_map(data, tmp_path):
    straight, cut = refined(data, tmp_path, "straight"), refined(data, tmp_path, "cut")
    whole = train(straight)
    assert [event.stage for event in whole.of(EpochDone)] == ["autoencoder"] * 3 + ["ot"] * 2 + ["networks"] * 2
    assert {"critic_gap", "content", "encoder_features"} <= whole.of(EpochDone)[-1].numbers.keys()
    measured = [one.stage for one in whole.of(Measured)]
    assert measured == ["autoencoder", "autoencoder", "ot", "networks"]
    for more in (4, 2):  # within stage 2, and within the refinement
        with pytest.raises(Stopped):
            train(cut, stop_after=more)
    again = train(cut)
    models = [packaged(config, driver) for config, driver in ((straight, whole), (cut, again))]
    files = [{path.name: path.read_bytes() for path in model.iterdir() if path.name != MANIFEST} for model in models]
    assert files[0] == files[1]
    [evaluated] = whole.of(Evaluated)
    assert len(evaluated.code_map["images"]) == len(evaluated.code_map["drawn"]) == ROWS
    assert "refined against a critic" in write_card(straight.run_dir).read_text()


def test_a_refined_run_takes_over_the_autoencoder_of_another_and_none_starts_from_it(data, tmp_path):
    tree = refined(data, tmp_path, "first").model_dump(mode="json") | {"method": "autoencoder"}
    first = Config.model_validate({key: value for key, value in tree.items() if key != "networks"})
    train(first)
    second = refined(data, tmp_path, "second", stage_one=str(first.run_dir))
    second.run_dir.mkdir(parents=True)
    store = open_store(second.checkpoint_url, second.s3)
    stage_one.start_from(second, Index.load(second.data.url, second.s3), store, lambda: None)
    assert {event.stage for event in train(second).of(EpochDone)} == {"ot", "networks"}
    third = refined(data, tmp_path, "third", stage_one=str(second.run_dir))
    with pytest.raises(UserError, match="give one of method=autoencoder"):
        stage_one.require_same_stage_one(third)
