"""DeepSpeed under the engine gives the numbers of plain PyTorch, whatever the ZeRO stage and the number of workers.

The same global batches are cut for one and for two workers; the reference is the plain engine in one process.
A step with a NaN on one worker alone must be withheld on all.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from glann.config.sections import EngineConfig
from glann.trainers.engine.build import build_engine
from glann.trainers.engine.optimizer import OptimizerConfig
from torch import nn

BATCH, STEPS = 12, 5
ADAM = OptimizerConfig(1e-3, (0.5, 0.999), 0.9)


def train(rank, world, seed, kind, zero, accumulation, clip, restart):
    """Five steps, the third with a NaN on the first worker; the state and what each step said."""

    class Net(nn.Module):
        """Sizes that two workers do not divide."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 17), nn.Linear(17, 27)

        def forward(self, z_BD, weight_B=None):
            return self.second(torch.tanh(self.first(z_BD))).view(-1, 3, 3, 3)

    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train sets it for its workers
    torch.manual_seed(seed)
    z, x = torch.randn(STEPS, BATCH, 5), torch.rand(STEPS, BATCH, 3, 3, 3)
    weight_B = torch.ones(BATCH)
    weight_B[-1] = 0
    config = EngineConfig(kind=kind, zero=zero, accumulation=accumulation, clip_norm=clip)
    engine = build_engine(Net(), ADAM, config, BATCH, torch.device("cpu"))
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    said = []
    for step in range(STEPS):
        if restart and step == 3:
            engine = build_engine(Net(), ADAM, config, BATCH, torch.device("cpu"), engine.state())
        z_BD, target = z[step, own].clone(), x[step, own]
        if step == 2 and rank == 0:
            z_BD[0] = float("nan")
        result = engine.step(
            z_BD,
            weight_B[own],
            lambda fake, part: (fake - target[part]).abs().mean((1, 2, 3)),  # noqa: B023
            1e-2,
            torch.tensor([1.0, rank]),
        )
        said.append((result.loss, result.grad_BD.numpy(), result.applied, result.piggyback_K.tolist()))
    state = engine.state()
    groups = ("weights", "ema", "exp_avg", "exp_avg_sq")
    return said, {key: {name: t.numpy() for name, t in state[key].items()} for key in groups}, state["updates"]


def compare(answers, reference):
    said, state, updates = reference
    assert answers[0][2] == updates == STEPS - 1
    for step in range(STEPS):
        assert [answer[0][step][2] for answer in answers] == [step != 2] * len(answers)
        assert all(answer[0][step][3] == [len(answers), sum(range(len(answers)))] for answer in answers)
        if step != 2:
            assert answers[0][0][step][0] == pytest.approx(said[step][0], rel=1e-5)
            grad_BD = np.concatenate([answer[0][step][1] for answer in answers])
            np.testing.assert_allclose(grad_BD, said[step][1], atol=2e-8, rtol=1e-4)
    for key, tensors in state.items():
        for name, tensor in tensors.items():
            for answer in answers:
                np.testing.assert_allclose(answer[1][key][name], tensor, atol=2e-7, err_msg=f"{key} {name}")


@pytest.fixture(scope="module")
def seed():
    value = int(torch.randint(2**31, ()))
    print("seed", value)
    return value


@pytest.mark.parametrize("world", [1, 2])
def test_every_zero_stage_ends_where_plain_pytorch_ends(local_ray, gloo_group, world, seed):
    with gloo_group(world) as members:
        for clip in (0.0, 0.02):
            reference = train(0, 1, seed, "torch", 0, 1, clip, False)
            for zero in (0, 1, 2, 3):
                for accumulation, restart in ((1, False), (2, False), (2, True)):
                    calls = [
                        member.run.remote(train, rank, world, seed, "deepspeed", zero, accumulation, clip, restart)
                        for rank, member in enumerate(members)
                    ]
                    answers = local_ray.get(calls, timeout=300)
                    print(f"clip {clip} world {world} zero {zero} accumulation {accumulation} restart {restart}")
                    compare(answers, reference)
