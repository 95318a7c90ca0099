"""Protects the run from a latent gradient that is finite but too large: its step is skipped, and training continues.

Above 1.8e19 the square of a gradient is infinite in float32 and would stay in the row's optimiser for ever, so the
latent table refuses it. One row of one worker has such a gradient, once, in the real loop of stage 1.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.run import validate
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.trainers.engine.build import build_engine
from glann.trainers.engine.optimizer import OptimizerConfig
from glann.trainers.glo import train_glo
from torch import nn

ROWS, BATCH, DIM, BAD_STEP = 26, 6, 5, 2
GROUPS = ("weights", "exp_avg", "exp_avg_sq")


def train(rank, world, folder, kind, zero):
    """What every step of an epoch left behind: whether it was applied, the engine's state and the table's."""

    class Net(nn.Module):
        """A generator without BatchNorm whose third pass has a gradient of 1e20 for the last worker's first row."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(DIM, 17), nn.Linear(17, 3 * 32 * 32)
            self.passes = 0

        def forward(self, z_BD, weight_B=None):
            if self.passes == BAD_STEP and rank == world - 1:
                z_BD.register_hook(lambda grad_BD: torch.cat([torch.full_like(grad_BD[:1], 1e20), grad_BD[1:]]))
            self.passes += 1
            return torch.sigmoid(self.second(torch.tanh(self.first(z_BD)))).view(-1, 3, 32, 32)

    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train sets it for its workers
    settings = validate(
        {
            "name": "t",
            "data": {"url": folder, "resolution": 32},
            "generator": {"kind": "infogan", "latent_dim": DIM, "width": 8, "batch_norm": False},
            "glo": {"epochs": 1, "batch_size": BATCH},
            "engine": {"kind": kind, "zero": zero},
            "cluster": {"workers": world},
        },
        "test",
    )
    torch.manual_seed(0)
    device = torch.device("cpu")
    engine = build_engine(Net(), OptimizerConfig(1e-3, (0.5, 0.999)), settings.engine, BATCH, device)
    table = LatentTable.in_process(ranges(ROWS, world)[rank], DIM, settings.seed)
    seen = []
    steps = train_glo(
        settings,
        ImageRows(folder),
        table,
        engine,
        lambda fake, real, seed_B: (fake - real).abs().mean((1, 2, 3)),
        (0, 0),
        lambda: torch.zeros(1),
    )
    for step in steps:
        state, held = engine.state(), table.snapshot()
        arrays = {f"{key} {name}": tensor.numpy() for key in GROUPS for name, tensor in state[key].items()}
        seen.append((step.applied, state["updates"], arrays, held))
    return seen


def check(answers):
    visits = sum(int((seen[BAD_STEP][3]["steps"] - seen[BAD_STEP - 1][3]["steps"]).sum()) for seen in answers)
    assert visits in (BATCH - 1, BATCH)  # rows of a step that is skipped count as visited
    for seen in answers:
        assert [applied for applied, *_ in seen] == [step != BAD_STEP for step in range(len(seen))]
        assert [updates for _, updates, *_ in seen] == [1, 2, 2, 3, 4]
        (_, _, weights, table), (_, _, weights_after, table_after) = seen[BAD_STEP - 1], seen[BAD_STEP]
        for name, array in weights.items():
            np.testing.assert_array_equal(array, weights_after[name], err_msg=name)
        for name in table.keys() - {"steps"}:
            np.testing.assert_array_equal(table[name], table_after[name], err_msg=name)
        for step in range(1, len(seen)):
            if step != BAD_STEP:
                assert any((seen[step][2][name] != seen[step - 1][2][name]).any() for name in weights)
                assert (seen[step][3]["z"] != seen[step - 1][3]["z"]).any()
        assert all(np.isfinite(array).all() for array in [*seen[-1][2].values(), *seen[-1][3].values()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    img_NHWC = np.random.default_rng(6).integers(0, 256, (ROWS, 32, 32, 3), np.uint8)
    np.savez(folder / "source.npz", images=img_NHWC)
    pack(str(folder / "source.npz"), str(folder / "set"), resolution=32)
    return str(folder / "set")


def test_a_gradient_too_large_for_the_table_skips_the_step(folder):
    check([train(0, 1, folder, "torch", 0)])


@pytest.mark.parametrize("world", [1, 2])
def test_every_worker_skips_the_step_on_every_zero_stage(local_ray, gloo_group, folder, world):
    with gloo_group(world) as members:
        for zero in (0, 1, 2, 3):
            print(f"world {world} zero {zero}")
            calls = [
                member.run.remote(train, rank, world, folder, "deepspeed", zero) for rank, member in enumerate(members)
            ]
            check(local_ray.get(calls, timeout=300))
