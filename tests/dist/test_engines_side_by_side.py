"""Engines of several networks in one process, with and without DeepSpeed, train as each of them does alone.

Two workers on every ZeRO stage against plain PyTorch engines in one process. The networks take turns, as a generator
and a critic do, and the loss of the first goes through the second; they differ in size, batch, micro-batches, betas
and moving average, one meets a NaN that must not withhold the other's step, and both are rebuilt from their own states
half-way.
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

WIDTHS, BATCHES, ACCUMULATION = ((5, 17, 7), (7, 9, 3)), (12, 8), (2, 1)
ADAMS = (OptimizerConfig(1e-3, (0.5, 0.999), 0.9), OptimizerConfig(1e-3, (0.9, 0.99)))
STEPS, RESUMED_AT, NAN_AT = 6, 3, 2
GROUPS = ("weights", "ema", "exp_avg", "exp_avg_sq")


def train(rank, world, seed, kind, zero, resumed):
    """The state of both networks, and what their steps returned; the first network's third step has a NaN on rank 0."""

    class Net(nn.Module):
        """Sizes that two workers do not divide."""

        def __init__(self, inputs, hidden, outputs):
            super().__init__()
            self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

        def forward(self, z_BD, weight_B=None):
            return self.second(torch.tanh(self.first(z_BD)))

    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train sets it for its workers
    torch.manual_seed(seed)
    starts = [Net(*widths) for widths in WIDTHS]
    data = [
        (torch.randn(STEPS, batch, widths[0]), torch.rand(STEPS, batch, 3))
        for batch, widths in zip(BATCHES, WIDTHS, strict=True)
    ]

    def built(at, network, state=None):
        config = EngineConfig(kind=kind, zero=zero, accumulation=ACCUMULATION[at], clip_norm=0.05)
        return build_engine(network, ADAMS[at], config, BATCHES[at], torch.device("cpu"), state)

    engines = [built(at, network) for at, network in enumerate(starts)]
    results = []
    for step in range(STEPS):
        if resumed and step == RESUMED_AT:
            states = [engine.state() for engine in engines]
            engines = [built(at, Net(*WIDTHS[at]), state) for at, state in enumerate(states)]
        for at, engine in enumerate(engines):
            critic = engines[1].network
            critic.requires_grad_(at == 1)  # a loss through it leaves it no gradients
            own = slice(rank * BATCHES[at] // world, (rank + 1) * BATCHES[at] // world)
            z_BD, target = data[at][0][step, own].clone(), data[at][1][step, own]
            if (at, step, rank) == (0, NAN_AT, 0):
                z_BD[0] = float("nan")
            result = engine.step(
                z_BD,
                torch.ones(len(z_BD)),
                # squares: the signs of L1 can cancel to zero but for rounding, of which Adam's first step makes a whole one
                lambda out, part: ((out if at else critic(out)) - target[part]).square().mean(1),  # noqa: B023
                1e-2,
                torch.tensor([float(at + 1)]),
            )
            results.append((at, step, result.loss, result.applied, float(result.piggyback_K)))
    states = [engine.state() for engine in engines]
    kept = [{key: {name: t.numpy() for name, t in s[key].items()} for key in GROUPS if key in s} for s in states]
    return results, kept, [state["updates"] for state in states]


def compare(answer, reference):
    results, states, updates = answer
    assert updates == reference[2] == [STEPS - 1, STEPS]
    for (at, step, loss, applied, summed), expected in zip(results, reference[0], strict=True):
        assert (at, step, applied, summed) == (*expected[:2], (at, step) != (0, NAN_AT), 2.0 * (at + 1))
        if applied:
            assert loss == pytest.approx(expected[2], rel=1e-5)
    for at, state in enumerate(reference[1]):
        assert states[at].keys() == state.keys()
        for key, tensors in state.items():
            for name, tensor in tensors.items():
                np.testing.assert_allclose(states[at][key][name], tensor, atol=2e-7, err_msg=f"{at} {key} {name}")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_networks_side_by_side_end_where_plain_pytorch_ends(local_ray, gloo_group, zero):
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    reference = train(0, 1, seed, "torch", 0, False)
    with gloo_group(2) as members:
        for resumed in (False, True):
            calls = [m.run.remote(train, rank, 2, seed, "deepspeed", zero, resumed) for rank, m in enumerate(members)]
            answers = local_ray.get(calls, timeout=300)
            print(f"zero {zero} resumed {resumed}")
            for answer in answers:
                compare(answer, reference)
