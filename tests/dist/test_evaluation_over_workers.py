"""An evaluation by several workers, each with its part of the rows and samples, ends in the numbers of a single one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.run import Config
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.metrics.evaluate import ImageSets, Trained, measure
from glann.metrics.features.extractor import EXTRACTORS, ExtractorSpec
from glann.metrics.nearest import nearest_images
from glann.metrics.result import by_key
from glann.metrics.team import Team
from glann.models.comm import rank, world_size
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.trainers.run.evaluation import drawn_from, gaussian_of, model_of
from glann.trainers.run.measuring import Interim
from torch import nn

ROWS, HELD_OUT, DIM = 101, 47, 5


def make_config(folder, samples: int, metrics: list[str]) -> Config:
    return Config.model_validate(
        {
            "name": "measured",
            "data": {"url": str(folder / "data"), "resolution": 28, "channels": 1},
            "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
            "sampler": {"kind": "imle", "noise_dim": 3, "hidden_dim": 8},
            "evaluation": {"samples": samples, "extractor": "squeezenet", "metrics": metrics},
            "glo": {"epochs": 1},
            "tracking": {"enabled": False},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("measured"), np.random.default_rng()
    images, unseen = (rng.integers(0, 256, (count, 28, 28, 1), np.uint8) for count in (ROWS, HELD_OUT))
    np.savez(folder / "x.npz", images=images, test_images=unseen)
    pack(str(folder / "x.npz"), str(folder / "data"), resolution=28, channels=1)
    return folder


def evaluate_part(config: Config, networks: dict, z_ND: torch.Tensor):
    """What rank 0 of a group gets: results, the Gaussian, nearest images and pictures; and how many each worked on."""
    EXTRACTORS["squeezenet"] = ExtractorSpec(
        "squeezenet-caffe", 147, lambda *_: nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten()), lambda img: img[:, :1]
    )
    worked: list[int] = []
    team = Team.of_all(worked.append)
    images, held_out = ImageRows(config.data.url), ImageRows(f"{config.data.url}/held-out")

    def codes(rows: range):
        return iter(z_ND[rows.start : rows.stop].split(7))

    gaussian = gaussian_of(codes, ROWS, team)
    model = model_of(config, networks, gaussian, torch.device("cpu"))
    results = measure(config, Trained(model, ROWS, codes), ImageSets(images, held_out=held_out), team=team)
    nearest = nearest_images(model.sample(5), images, team=team)
    drawn = {name: np.asarray(sheet.picture()) for name, sheet in drawn_from(model, 5, team).items()}
    return by_key(results), gaussian, nearest, sum(worked), drawn


@pytest.mark.parametrize(("samples", "metrics"), [(2, []), (83, ["kid", "prd", "modes", "codes"])])
def test_any_number_of_workers_ends_in_the_same_numbers(samples, metrics, folder, local_ray, gloo_group, tmp_path):
    """With 2 samples a third worker has none. The cache is another one each time, so that real images are read."""
    config, z_ND = make_config(folder, samples, metrics), nn.functional.normalize(torch.randn(ROWS, DIM), dim=1)
    networks = {
        "generator": {"weights": build_generator(config.generator, 28, 1).state_dict()},
        "mapping": {"weights": build_mapping(config.sampler, DIM).state_dict()},
    }
    answers = {}
    for world in (1, 3):
        with gloo_group(world) as members:
            cache = str(tmp_path / str(world))
            local_ray.get([member.run.remote(set_cache, cache) for member in members])
            parts = local_ray.get([m.run.remote(evaluate_part, config, networks, z_ND) for m in members], timeout=300)
        answers[world] = parts[0]
        assert all(not results and nearest is None and not drawn for results, _, nearest, _, drawn in parts[1:])
        worked = [part[3] for part in parts]
        assert sum(worked) == 3 * ROWS + HELD_OUT + 3 * min(samples, ROWS)
        assert max(worked) - min(worked) <= 7 + samples**0.5 * 2, "but for one of each set, and for random rows"
    values, gaussian, nearest, _, drawn = answers[1]
    assert {"l1", "fd_squeezenet", "gaussian/fd_squeezenet:held-out"} <= values.keys()
    assert not metrics or {"kid_squeezenet:held-out", "precision_codes"} <= values.keys()
    others, of_others, found, _, drawn_by_three = answers[3]
    assert others == pytest.approx(values, rel=1e-6, abs=1e-9)
    for name, tensor in gaussian.items():
        torch.testing.assert_close(of_others[name], tensor, atol=1e-6, rtol=1e-5)
    assert (found.rows_N == nearest.rows_N).all()
    assert (found.img_NHWC == nearest.img_NHWC).all()
    assert {*drawn} == {"samples", "interpolations"}
    for name, picture in drawn.items():
        np.testing.assert_allclose(drawn_by_three[name].astype(int), picture.astype(int), atol=1)


def measure_part(config: Config, networks: dict, z_ND: torch.Tensor):
    """What a measurement while the run trains finds in stage 1, and in stage 2, with this worker's part of the codes."""
    EXTRACTORS["squeezenet"] = ExtractorSpec(
        "squeezenet-caffe", 147, lambda *_: nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten()), lambda img: img[:, :1]
    )
    images = ImageRows(config.data.url)
    rows = ranges(ROWS, world_size())[rank()]
    table = LatentTable.in_process(rows, DIM, 0)
    table.restore(table.snapshot() | {"z": z_ND[rows.start : rows.stop].numpy()})
    interim = Interim(config, images, torch.device("cpu"))
    first = {"generator": networks["generator"]}
    compare = [interim.measure(states, table, lambda phase: True) for states in (first, networks)]
    return [by_key(found()) for found in compare]


@pytest.mark.parametrize("samples", [2, 83])
def test_any_number_of_workers_measures_the_same_while_it_trains(samples, folder, local_ray, gloo_group, tmp_path):
    config, z_ND = make_config(folder, 50, []), nn.functional.normalize(torch.randn(ROWS, DIM), dim=1)
    evaluation = config.evaluation.model_copy(update={"interim_samples": samples, "every_epochs": 1})
    config = config.model_copy(update={"evaluation": evaluation})
    networks = {
        "generator": {"weights": build_generator(config.generator, 28, 1).state_dict()},
        "mapping": {"weights": build_mapping(config.sampler, DIM).state_dict()},
    }
    answers = {}
    for world in (1, 3):
        with gloo_group(world) as members:
            local_ray.get([member.run.remote(set_cache, str(tmp_path / str(world))) for member in members])
            parts = local_ray.get([m.run.remote(measure_part, config, networks, z_ND) for m in members], timeout=300)
        answers[world] = parts[0]
        assert all(part == [{}, {}] for part in parts[1:])
    for one, three in zip(answers[1], answers[3], strict=True):
        assert three == pytest.approx(one, rel=1e-6, abs=1e-9)
    assert answers[1][0].keys() >= {"gaussian/fd_squeezenet", "reconstruction/fd_squeezenet"}
    assert "fd_squeezenet" in answers[1][1]


def set_cache(path: str) -> None:
    import os

    os.environ["GLANN_CACHE"] = path
