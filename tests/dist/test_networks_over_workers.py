"""A generator and its critic on two workers end where one process without DeepSpeed ends, on every ZeRO stage.

With all that could depend on the cut: BatchNorm and a moving average in the generator, a gradient penalty (two engines
in one process, and double backward), and terms over the whole batch; resumed half-way on top.
"""

from __future__ import annotations

import os
from itertools import islice

import numpy as np
import torch
from glann.cluster.latents import LatentTable
from glann.config.run import validate
from glann.trainers.networks import Networks
from glann.trainers.stage import StageContext

ROWS, BATCH, STEPS, RESUMED_AT = 25, 10, 6, 2  # three batches an epoch: of nine and eight rows
LR = 1e-3
KEYS = {"penalty": {"kind": "between"}, "feature_matching": 0.5, "pull_away": 0.1}


def train(rank, world, kind, zero, resumed):
    from types import SimpleNamespace

    class Images:
        index = SimpleNamespace(channels=1, resolution=28)

        def __len__(self):
            return ROWS

        def decode(self, row):
            return np.random.default_rng(row).integers(0, 256, (1, 28, 28), dtype=np.uint8)

    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train sets it for its workers
    settings = validate(
        {
            "name": "t",
            "method": "gan",
            "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1},
            "generator": {"kind": "infogan", "latent_dim": 6, "width": 4},
            "networks": {
                "epochs": 2,
                "batch_size": BATCH,
                "ema": 0.5,
                "generator_lr": LR,
                "critic": {"width": 4, "lr": LR},
                **KEYS,
            },
            "sampler": {"kind": "prior"},
            "engine": {"kind": kind, "zero": zero},
            "cluster": {"workers": world},
        },
        "test",
    )

    def stage(networks):
        table = LatentTable.in_process(range(0), 1, 0)
        return Networks(StageContext(settings, Images(), table, torch.device("cpu")), networks)

    made, losses = stage({}), []
    for first, count in ((0, RESUMED_AT), (RESUMED_AT, STEPS - RESUMED_AT)):
        if resumed and first:
            made = stage(made.state())
        done = islice(made.steps(first // 3, first % 3, lambda: torch.ones(2)), count)
        for step in done:
            losses.append(step.loss)
            if not (step.applied and step.piggyback_K.tolist() == [world, world]):
                raise ValueError(f"step {step}")
    state = made.state()
    groups = ("weights", "ema", "exp_avg")
    kept = {
        f"{name} {group} {key}": tensor.numpy()
        for name, held in state.items()
        for group in groups
        for key, tensor in held.get(group, {}).items()
    }
    return losses, kept, [held["updates"] for held in state.values()]


def test_two_workers_end_where_one_ends(local_ray, gloo_group):
    losses, kept, updates = train(0, 1, "torch", 0, False)
    with gloo_group(2) as members:
        for zero, resumed in ((0, False), (1, True), (2, False), (3, True)):
            calls = [m.run.remote(train, rank, 2, "deepspeed", zero, resumed) for rank, m in enumerate(members)]
            for answer in local_ray.get(calls, timeout=600):
                print(f"zero {zero} resumed {resumed}")
                assert answer[2] == updates
                np.testing.assert_allclose(answer[0], losses, rtol=1e-3, atol=1e-4)
                assert answer[1].keys() == kept.keys()
                for name, tensor in kept.items():
                    # weights: a tenth of one of Adam's steps, which are as long where a gradient is rounding noise
                    atol = 1e-3 * np.abs(tensor).max() if "exp_avg" in name else LR / 10
                    np.testing.assert_allclose(answer[1][name], tensor, atol=atol, rtol=1e-3, err_msg=name)
