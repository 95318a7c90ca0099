"""`from=RUN`: a run takes over codes and generator of another, bit for bit, and only where stage 1 is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from glann.cluster.checkpoints import reader, retention
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.cluster.latents import LatentTable
from glann.config.run import Config, load
from glann.datasets.index import Index
from glann.datasets.pack import pack
from glann.errors import UserError
from glann.models.generators import build_generator
from glann.reports.run_folder import write_config
from glann.storage.open import open_store
from glann.trainers.plan.estimate import make_plan
from glann.trainers.run.stage_one import require_same_stage_one, start_from
from glann.trainers.run.state import Position, Saved
from glann.trainers.run.state import load as load_saved

ROWS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 28, 28), np.uint8)
    np.savez(folder / "few.npz", images=images)
    pack(str(folder / "few.npz"), str(folder / "few"), resolution=28, channels=1)
    return folder / "few"


def settings(tmp_path: Path, data: Path, *overrides: str) -> Config:
    base = [f"runs_dir={tmp_path / 'runs'}", f"data.url={data}", "data.source=null", "generator.width=8"]
    return load("digits", [*base, "generator.latent_dim=6", "tracking.enabled=false", *overrides])


@pytest.fixture
def trained(tmp_path, data):
    """A run of the name `digits` whose checkpoint is at the given stage."""

    def make(stage: str) -> tuple[Config, LatentTable]:
        config = settings(tmp_path, data)
        config.run_dir.mkdir(parents=True)
        write_config(config.run_dir, config)
        generator = build_generator(config.generator, 28, 1)
        weights = generator.state_dict()
        moments = {name: torch.ones_like(tensor) for name, tensor in generator.named_parameters()}
        averaged = {name: tensor + 1 for name, tensor in generator.named_parameters()}
        state = {"weights": weights, "exp_avg": moments, "ema": averaged, "updates": 7.0}
        latents = LatentTable.in_process(range(ROWS), 6, seed=config.seed)
        saved = Saved(Position(stage, 0, 0, 40), {"generator": state})
        writer = CheckpointWriter(open_store(config.checkpoint_url, config.s3), 0, 1, 9, 20.0)
        writer.save(40, saved.files(), latents, saved.state(Index.load(str(data), config.s3), ROWS, config))
        writer.wait()
        return config, latents

    return make


@pytest.mark.parametrize("stage", ["imle", "done"])
def test_the_codes_and_the_generator_are_taken_over_bit_for_bit(trained, tmp_path, data, stage):
    there, latents = trained(stage)
    here = settings(tmp_path, data, "name=mixture", "seed=5", f"from={there.run_dir}", "sampler.kind=gmm")
    assert here.stage_one == str(there.run_dir)
    index, store = Index.load(str(data), here.s3), open_store(here.checkpoint_url, here.s3)
    fenced = []
    start_from(here, index, store, lambda: fenced.append(True))
    assert fenced
    step = retention.latest(store)
    saved = load_saved(store, step, index, ROWS)
    assert (saved.position.stage, saved.position.epoch, saved.position.step) == ("gmm", 0, 0)
    source = load_saved(open_store(there.checkpoint_url, there.s3), 40, index, ROWS)
    assert set(saved.networks) == {"generator"}
    assert set(saved.networks["generator"]) == {"weights", "ema", "updates"}
    for group in ("weights", "ema"):
        for name, tensor in source.networks["generator"][group].items():
            assert torch.equal(saved.networks["generator"][group][name], tensor)
    copied = reader.load_rows(store, step, range(ROWS))
    assert np.array_equal(copied["z"], latents.codes().numpy())
    assert reader.load_state(store, step)["config"]["stage_one"] == str(there.run_dir)


def test_a_run_in_its_first_stage_is_refused(trained, tmp_path, data):
    there, _ = trained("glo")
    here = settings(tmp_path, data, "name=mixture", f"from={there.run_dir}", "sampler.kind=gmm")
    store = open_store(here.checkpoint_url, here.s3)
    with pytest.raises(UserError, match="has not completed stage 1"):
        start_from(here, Index.load(str(data), here.s3), store, lambda: None)
    assert retention.latest(store) is None


def test_another_stage_one_is_refused_by_name(trained, tmp_path, data):
    there, _ = trained("done")
    start = ["name=mixture", f"from={there.run_dir}"]
    same = ["sampler.kind=flow", "seed=9", "cluster.workers=1", "evaluation.extractor=lite0"]
    require_same_stage_one(settings(tmp_path, data, *start, *same))
    for change in ("glo.epochs=3", "generator.upsample=resize", "loss.kind=l1", "data.max_rows=5"):
        with pytest.raises(UserError, match=change.split("=")[0]):
            require_same_stage_one(settings(tmp_path, data, *start, change))
    with pytest.raises(UserError):
        require_same_stage_one(settings(tmp_path, data, "name=mixture", f"from={tmp_path / 'nowhere'}"))


def test_the_plan_does_not_count_the_stage_that_is_taken_over(trained, tmp_path, data):
    there, _ = trained("done")
    whole = make_plan(settings(tmp_path, data, "name=mixture"))
    taken = make_plan(settings(tmp_path, data, "name=mixture", f"from={there.run_dir}"))
    assert whole.costs["glo"].flops > 0
    assert (taken.costs["glo"].steps, taken.costs["glo"].flops) == (0, 0)
    assert taken.costs["gmm"] == whole.costs["gmm"]


def test_from_and_stage_one_are_one_key(tmp_path, data):
    recipe = tmp_path / "both.yaml"
    recipe.write_text("name: a\nfrom: runs/a\nstage_one: runs/b\n")
    with pytest.raises(UserError, match="from and stage_one are the same key"):
        load(recipe)
