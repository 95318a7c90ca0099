"""Feature maps of real images that are kept change no number, are computed once, and have a bound that is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.config.run import validate
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.errors import UserError
from glann.models.perceptual import SqueezeNet
from glann.trainers import objective
from glann.trainers.feature_cache import FeatureCache
from glann.trainers.glo import Glo
from glann.trainers.plan.costs import cache_bytes, maps_values
from glann.trainers.plan.estimate import make_plan
from glann.trainers.stage import StageContext

ROWS, BATCH, DIM, EPOCHS = 11, 3, 5, 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    np.savez(folder / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (ROWS, 32, 32, 3), np.uint8))
    pack(str(folder / "noise.npz"), str(folder / "packed"), resolution=32)
    return str(folder / "packed")


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    torch.manual_seed(0)
    weights = SqueezeNet("caffe").state_dict()
    monkeypatch.setattr(objective, "load_weights", lambda name: (weights, "caffe"))


def config_of(packed: str, **loss):
    tree = {
        "name": "t",
        "data": {"url": packed, "resolution": 32},
        "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
        "loss": {"kind": "perceptual", "network": "squeezenet", "magnify": 1.5, "levels": 2} | loss,
        "glo": {"epochs": EPOCHS, "batch_size": BATCH},
        "engine": {"kind": "torch"},
        "cluster": {"workers": 1},
    }
    return validate(tree, "test")


def stage_of(packed: str, rows: range = range(ROWS), **loss) -> Glo:
    config = config_of(packed, **loss)
    table = LatentTable.in_process(rows, DIM, config.seed)
    return Glo(StageContext(config, ImageRows(packed), table, torch.device("cpu")), {})


def losses_of(stage: Glo) -> list[float | None]:
    return [step.loss for step in stage.steps(0, 0, lambda: torch.zeros(3))]


def passes(stage: Glo) -> list[bool]:
    """Whether each pass of the feature network has a graph; grows as the stage trains."""
    seen: list[bool] = []
    stage.loss.loss.features.register_forward_hook(lambda *call: seen.append(torch.is_grad_enabled()))
    return seen


def test_the_training_is_the_same_and_each_real_image_is_seen_once(packed):
    kept, anew = stage_of(packed, cache_features=1), stage_of(packed)
    calls, calls_anew = passes(kept), passes(anew)
    np.testing.assert_allclose(losses_of(kept), losses_of(anew), rtol=1e-5)
    np.testing.assert_allclose(kept.context.latents.codes(), anew.context.latents.codes(), atol=1e-5)
    steps, scales = -(-ROWS // BATCH), 2
    assert calls_anew.count(False) == calls_anew.count(True) == EPOCHS * steps * scales
    assert calls.count(True) == EPOCHS * steps * scales
    assert calls.count(False) == steps * scales


def test_the_maps_of_a_row_are_its_own_in_any_batch(packed):
    stage = stage_of(packed, range(4, ROWS), cache_features=1)
    cache, img_BCHW = stage.features, torch.rand(3, 3, 32, 32)
    first_BV = cache.maps(np.array([4, 6, 9]), np.ones(3, bool), img_BCHW).clone()
    assert first_BV.shape == (3, maps_values(stage.context.config))
    again_BV = cache.maps(np.array([9, 4]), np.ones(2, bool), torch.zeros(2, 3, 32, 32))
    assert torch.equal(again_BV, first_BV[[2, 0]])


def test_rows_without_an_image_are_not_kept(packed):
    cache = stage_of(packed, cache_features=1).features
    cache.maps(np.array([0, 1, 0]), np.array([True, False, False]), torch.rand(3, 3, 32, 32))
    assert cache.known_n.tolist() == [True, *[False] * (ROWS - 1)]
    image_BCHW = torch.rand(1, 3, 32, 32)
    maps_BV = cache.maps(np.array([1]), np.ones(1, bool), image_BCHW)
    torch.testing.assert_close(maps_BV, cache.compute(image_BCHW))


def test_a_cache_that_does_not_fit_is_refused_with_the_size(packed):
    needed = cache_bytes(config_of(packed, cache_features=1), ROWS)
    assert needed == 4 * ROWS * maps_values(config_of(packed))
    for build in (stage_of, lambda *where, **loss: make_plan(config_of(*where, **loss))):
        with pytest.raises(UserError, match=rf"cache_features=.* GB is too small: .* {ROWS} images take"):
            build(packed, cache_features=0.9 * needed / 1e9)


def test_the_plan_counts_it(packed):
    plan = make_plan(config_of(packed, cache_features=1))
    assert plan.memory.training["feature maps of real images"] == cache_bytes(plan.config, ROWS)
    assert "feature maps of real images" not in make_plan(config_of(packed)).memory.training


@pytest.mark.parametrize("loss", [{"patch": 32}, {"kind": "l1", "network": "vgg16", "magnify": 1.0, "levels": 1}])
def test_it_is_refused_where_there_are_no_maps_of_whole_images(packed, loss):
    with pytest.raises(UserError, match="cache_features"):
        config_of(packed, cache_features=1, **loss)


def test_it_is_a_bound_and_not_an_allocation_of_it(packed):
    cache = FeatureCache(config_of(packed, cache_features=1000), range(2), torch.device("cpu"), lambda img: img)
    assert cache.maps_nV.shape[0] == 2
