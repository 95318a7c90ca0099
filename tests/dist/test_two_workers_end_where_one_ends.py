"""One worker and two workers on the same global batches end with the same codes and weights.

Through the real generator with shared BatchNorm, the real table and DeepSpeed; both stages.
Tolerance: sums over workers are added in another order. Codes agree to 1e-5; weights to 1e-4, a tenth of one
of Adam's first steps, which have the size of the learning rate even where a gradient is all rounding noise.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from glann.cluster.latents import LatentTable
from glann.config.run import validate
from glann.models.generators import build_generator
from glann.trainers.engine.build import build_engine
from glann.trainers.engine.optimizer import OptimizerConfig
from glann.samplers.base import Codes, build_sampler

ROWS, BATCH = 26, 8


def config(workers):
    return validate(
        {
            "name": "t",
            "data": {"url": "x", "resolution": 28, "channels": 1},
            "generator": {"kind": "infogan", "latent_dim": 6, "width": 8},
            "glo": {"epochs": 1, "batch_size": BATCH, "ema": 0.5},
            "imle": {"epochs": 3, "noise_dim": 5, "batch_size": 7},
            "engine": {"zero": 1},
            "cluster": {"workers": workers},
        },
        "test",
    )


def train(rank, world):
    """Global batches of rows from both halves of the table, so that each worker owns four rows of each."""
    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train sets it for its workers
    settings = config(world)
    half = ROWS // 2
    rows = range(ROWS) if world == 1 else range(rank * half, (rank + 1) * half)
    table = LatentTable.in_process(rows, 6, settings.seed)
    torch.manual_seed(0)
    images = torch.rand(ROWS, 1, 28, 28)
    optimizer = OptimizerConfig(settings.glo.generator_lr, settings.glo.betas, settings.glo.ema)
    network = build_generator(settings.generator, 28, 1)
    engine = build_engine(network, optimizer, settings.engine, BATCH, torch.device("cpu"))
    order = torch.randperm(half)
    for step, at in enumerate(range(0, half, BATCH // 2)):
        both = order[at : at + BATCH // 2]
        batch = torch.cat([both, both + half])
        own_B = batch[(batch >= rows.start) & (batch < rows.stop)]
        padded_B = torch.cat([own_B, own_B[:1].expand(BATCH // world - len(own_B))])
        weight_B = (torch.arange(len(padded_B)) < len(own_B)).float()
        target = images[padded_B]
        result = engine.step(
            table.gather(padded_B.numpy()),
            weight_B,
            lambda f, p: (f - target[p]).abs().mean((1, 2, 3)),  # noqa: B023
            1e-3,
        )
        table.apply(0, step, own_B.numpy(), result.grad_BD[: len(own_B)], 0.01)
    state = engine.state()
    sampler = build_sampler(settings.sampler, 6, "sphere", seed=settings.seed, device=torch.device("cpu"))
    steps = sampler.fit(Codes(table.codes(), rows, ROWS), 0, lambda: torch.ones(2))
    losses = [step.epoch_facts["loss"] for step in steps if step.epoch_facts]
    as_numpy = {name: tensor.numpy() for name, tensor in state["weights"].items()}
    mapping = {name: tensor.numpy() for name, tensor in sampler.state()["weights"].items()}
    return table.codes().numpy(), as_numpy, mapping, losses


def test_two_workers_end_where_one_ends(local_ray, gloo_group):
    with gloo_group(1) as members:
        (z_ND, weights, mapping, losses) = local_ray.get(members[0].run.remote(train, 0, 1), timeout=300)
    with gloo_group(2) as members:
        calls = [member.run.remote(train, rank, 2) for rank, member in enumerate(members)]
        two = local_ray.get(calls, timeout=300)
    np.testing.assert_allclose(np.concatenate([answer[0] for answer in two]), z_ND, atol=1e-5)
    for answer in two:
        for name, tensor in weights.items():
            np.testing.assert_allclose(answer[1][name], tensor, atol=1e-4, err_msg=name)
        for name, tensor in mapping.items():
            np.testing.assert_allclose(answer[2][name], tensor, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(answer[3], losses, rtol=1e-4)
