"""An encoder and a generator on two workers end where one process without DeepSpeed ends, on every ZeRO stage.

With BatchNorm in both, which goes over the rows of all workers; resumed half-way on top. Codes as well. And a generator
that is trained by the nearest of its images, which the workers search together.
"""

from __future__ import annotations

import os
from itertools import islice

import numpy as np
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.run import validate
from glann.trainers.autoencoder import Autoencoder
from glann.trainers.pixels import Pixels
from glann.trainers.stage import StageContext

ROWS, BATCH, D, STEPS, RESUMED_AT = 25, 10, 6, 6, 2  # three batches an epoch: of nine and eight rows
LR = 1e-3


def train(rank, world, kind, zero, resumed, method="autoencoder"):
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
            "method": method,
            "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1},
            "generator": {"kind": "infogan", "latent_dim": D, "width": 4},
            "loss": {"kind": "bernoulli"},
            method.removeprefix("imle-"): {"epochs": 2, "batch_size": BATCH, "lr": LR},
            "sampler": {"kind": "prior"},
            "engine": {"kind": kind, "zero": zero},
            "cluster": {"workers": world},
        },
        "test",
    )
    table = LatentTable.in_process(ranges(ROWS, world)[rank], D, 0, optimizer="none", constraint="none")

    def stage(networks):
        kind_of_stage = Autoencoder if method == "autoencoder" else Pixels
        return kind_of_stage(StageContext(settings, Images(), table, torch.device("cpu")), networks)

    made, losses = stage({}), []
    for first, count in ((0, RESUMED_AT), (RESUMED_AT, STEPS - RESUMED_AT)):
        if resumed and first:
            made = stage(made.state())
        for step in islice(made.steps(first // 3, first % 3, lambda: torch.ones(2)), count):
            losses.append(step.loss)
            if not (step.applied and step.piggyback_K.tolist() == [world, world]):
                raise ValueError(f"step {step}")
    state = made.state()
    kept = {
        f"{name} {group} {key}": tensor.numpy()
        for name, held in state.items()
        for group in ("weights", "exp_avg")
        for key, tensor in held[group].items()
    }
    return losses, kept, [held["updates"] for held in state.values()], table.codes().numpy()


def test_two_workers_end_where_one_ends(local_ray, gloo_group):
    cases = [("autoencoder", zero, resumed) for zero, resumed in ((0, False), (1, True), (2, False), (3, True))]
    cases.append(("imle-pixels", 1, True))
    alone = {method: train(0, 1, "torch", 0, False, method) for method in ("autoencoder", "imle-pixels")}
    with gloo_group(2) as members:
        for method, zero, resumed in cases:
            losses, kept, updates, codes = alone[method]
            ends = [
                member.run.remote(train, rank, 2, "deepspeed", zero, resumed, method)
                for rank, member in enumerate(members)
            ]
            answers = local_ray.get(ends, timeout=600)
            print(f"{method} zero {zero} resumed {resumed}")
            found = np.concatenate([answer[3] for answer in answers])
            np.testing.assert_allclose(found, codes, atol=2e-3 * np.abs(codes).max(), rtol=1e-2)
            for answer in answers:
                assert answer[2] == updates
                np.testing.assert_allclose(answer[0], losses, rtol=1e-3, atol=1e-4)
                assert answer[1].keys() == kept.keys()
                for name, tensor in kept.items():
                    # weights: a tenth of one of Adam's steps, which are as long where a gradient is rounding noise
                    atol = 1e-3 * np.abs(tensor).max() if "exp_avg" in name else LR / 10
                    np.testing.assert_allclose(answer[1][name], tensor, atol=atol, rtol=1e-3, err_msg=name)
