"""The counts of benchmarks/scaling.py are those of what is sent, for up to 16 workers; its times add up."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from glann.cluster import neighbours
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.run import load, validate
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.models import comm
from glann.samplers import imle
from glann.samplers.base import Codes
from glann.samplers.imle import Imle
from glann.trainers.glo import Glo
from glann.trainers.stage import StageContext
from threaded_ranks import on_ranks

ROWS, DIM, NOISE, BATCH = 101, 3, 4, 25


@pytest.fixture(scope="module")
def scaling():
    path = Path(__file__).parents[3] / "benchmarks" / "scaling.py"
    spec = importlib.util.spec_from_file_location("scaling", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return load("celebahq-1024", [])


def mapping_config(**keys):
    tree = {
        "name": "t",
        "data": {"url": "x", "resolution": 32},
        "generator": {"kind": "infogan", "latent_dim": DIM},
        "glo": {"epochs": 1},
        "imle": {"noise_dim": NOISE, "batch_size": BATCH, "epochs": 2, "hidden_dim": 7} | keys,
    }
    return validate(tree, "test")


@pytest.mark.parametrize("most_steps", [None, 3])
@pytest.mark.parametrize("world", [2, 3, 16])
def test_what_stage_2_sends_is_what_is_counted(scaling, world, most_steps, monkeypatch):
    config, blocks, reduced = mapping_config(max_steps_per_epoch=most_steps), [], []
    torch.manual_seed(0)
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, DIM), dim=1)

    def start_transfer(held_mD, coming_mD, group):
        """The threads cannot exchange blocks in pairs: count what would be sent."""
        blocks.append(held_mD.numel() * held_mD.element_size())
        coming_mD.fill_(1.0)
        return []

    def all_sum(tensor, group=None):
        reduced.append(tensor.numel() * tensor.element_size())
        return comm.all_sum(tensor, group)

    monkeypatch.setattr(neighbours, "_start_transfer", start_transfer)
    monkeypatch.setattr("glann.samplers.adam.all_sum", all_sum)
    monkeypatch.setattr(imle, "all_sum", all_sum)

    def fit(rank):
        own = ranges(ROWS, world)[rank]
        sampler = Imle(config.sampler, DIM, "sphere", seed=0, device=torch.device("cpu"))
        codes = Codes(z_ND[own.start : own.stop], own, ROWS)
        for step in sampler.fit(codes, 0, lambda: torch.zeros(0)):
            if step.epoch_facts:
                break
        return sum(parameter.numel() for parameter in sampler.network.parameters())

    parameters = on_ranks(world, fit)[0]
    sizes = replace(
        scaling.sizes_of(load("celebahq-1024", [])),
        dim=DIM,
        noise_dim=NOISE,
        batch=BATCH,
        most_steps=most_steps or math.inf,
        mapping_parameters=parameters,
    )
    counts = scaling.stage_two_counts(sizes, ROWS, world)
    assert counts.steps == (most_steps or 5)
    assert len(blocks) == world * counts.messages["blocks"]
    assert len(reduced) == world * counts.messages["all-reduce"]
    candidates = round(sizes.candidates * ROWS)
    assert sum(blocks) == (world - 1) * candidates * 4 * DIM
    assert sum(blocks) / world == pytest.approx(counts.sent["candidates"], rel=0.01)
    # the payload; a ring sends 2 (W - 1) / W of it. The last all-reduce of the epoch has two float64 numbers.
    payload = counts.sent["gradients"] / (2 * (world - 1) / world)
    assert sum(reduced) / world == payload + 2 * 8


def test_what_stage_1_asks_of_the_table_is_what_is_counted(scaling, recipe, tmp_path):
    """One call a step, behind those that ask for the first batches of an epoch."""
    np.savez(tmp_path / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8))
    pack(str(tmp_path / "noise.npz"), str(tmp_path / "packed"), resolution=28, channels=1)
    config = validate(
        {
            "name": "t",
            "data": {"url": str(tmp_path / "packed"), "resolution": 28, "channels": 1},
            "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
            "loss": {"kind": "l1"},
            "glo": {"epochs": 1, "batch_size": 5},
            "engine": {"kind": "torch"},
        },
        "test",
    )
    table = LatentTable.in_process(range(40), DIM, 0)
    calls, start = Counter(), table._shard.start
    table._shard.start = lambda method, *arguments: calls.update([method]) or start(method, *arguments)
    stage = Glo(StageContext(config, ImageRows(config.data.url), table, torch.device("cpu")), {})
    list(stage.steps(0, 0, lambda: torch.zeros(0)))
    sizes = replace(scaling.sizes_of(recipe), batch_per_worker=5)
    counts = scaling.stage_one_counts(sizes, 40, 1)
    assert counts.steps == counts.messages["table"] == 8
    assert calls["apply"] + calls["apply_and_gather"] == counts.messages["table"]
    assert calls["gather"] == 2 + 1  # and one for the measure of the code space at its end


def test_the_terms_scale_as_they_must(scaling, recipe):
    sizes, rates = scaling.sizes_of(recipe), scaling.gpu_rates("H100 SXM")
    one, eight = (scaling.stage_two(sizes, rates, 10**6, workers) for workers in (8, 64))
    assert one["search"] == pytest.approx(8 * eight["search"])
    assert one["steps"] < eight["steps"]  # as many, each with more workers to wait for
    assert scaling.stage_two(sizes, rates, 2 * 10**6, 8)["search"] == pytest.approx(4 * one["search"])
    steps = {rows: scaling.stage_two_counts(sizes, rows, 8).steps for rows in (30_000, 512_000, 10**6, 10**8)}
    assert steps == {30_000: 235, 512_000: 4000, 10**6: 4000, 10**8: 4000}
    assert scaling.seconds({"a": 1.0, "b": 2.0, "c (overlaps)": 2.5}) == 3.0
    assert scaling.seconds({"a": 1.0, "b": 2.0, "c (overlaps)": 4.0}) == 4.0
    until = [scaling.exact_pays_until(sizes, rates, workers) for workers in scaling.WORKERS]
    assert max(until) / min(until) < 1.2  # both stages are divided by W
    assert 10**5 < until[0] < 10**10


@pytest.fixture(autouse=True)
def _no_group_is_left():
    yield
    assert not dist.is_initialized()
