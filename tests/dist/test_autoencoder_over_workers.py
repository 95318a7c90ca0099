"""An encoder and a generator on two workers end where one process without DeepSpeed ends, on every ZeRO stage.

With BatchNorm in both, which goes over the rows of all workers; resumed half-way on top. Codes as well. So do they with a
critic of images or of codes, a decoder that is refined against one, and a generator that is trained by the nearest of its
images, which the workers search together.
"""

from __future__ import annotations

import os
from itertools import islice

import numpy as np
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.run import validate
from glann.config.methods import METHODS
from glann.trainers.autoencoder import Autoencoder
from glann.trainers.networks import Networks
from glann.trainers.pixels import Pixels
from glann.trainers.sampler import SamplerStage
from glann.trainers.stage import StageContext

ROWS, BATCH, D, STEPS, RESUMED_AT = 25, 10, 6, 6, 2  # three batches an epoch: of nine and eight rows
LR = 1e-3
# By name: the method, its keys, and the stage that is compared. BatchNorm makes G blind to the mean of codes, which
# without a divergence the critic alone decides on: its weight keeps that from being left to rounding.
CASES = {
    "autoencoder": ("autoencoder", {}, Autoencoder),
    "vae-gan": (
        "autoencoder",
        {"autoencoder": {"adversary": {"judges": "images", "features": 0.1, "critic": {"width": 4, "lr": LR}}}},
        Autoencoder,
    ),
    "aae": (
        "autoencoder",
        {"autoencoder": {"kl": 0, "adversary": {"judges": "codes", "weight": 1e3, "critic": {"kind": "mlp", "width": 8, "lr": LR}}}},
        Autoencoder,
    ),
    "ae-ot-gan": ("ae-ot-gan", {"sampler": {"kind": "ot", "epochs": 1, "steps": 3}}, Networks),
    "imle-pixels": ("imle-pixels", {}, Pixels),
}


def train(rank, world, kind, zero, resumed, case):
    from types import SimpleNamespace

    class Images:
        index = SimpleNamespace(channels=1, resolution=28)

        def __len__(self):
            return ROWS

        def decode(self, row):
            return np.random.default_rng(row).integers(0, 256, (1, 28, 28), dtype=np.uint8)

    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train sets it for its workers
    method, keys, compared = CASES[case]
    settings = validate(tree_of(method, keys, kind, zero, world), "test")
    table = LatentTable.in_process(ranges(ROWS, world)[rank], D, 0, optimizer="none", constraint="none")
    context, networks = StageContext(settings, Images(), table, torch.device("cpu")), {}
    if compared is Networks:  # the stages before it, of one batch
        for before, steps in ((Autoencoder, 1), (SamplerStage, None)):
            made = before(context, networks)
            list(islice(made.steps(0, 0, lambda: torch.ones(2)), steps))
            networks |= made.state()

    made, losses = compared(context, networks), []
    for first, count in ((0, RESUMED_AT), (RESUMED_AT, STEPS - RESUMED_AT)):
        if resumed and first:
            made = compared(context, networks | made.state())
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


def tree_of(method, keys, kind, zero, world):
    """A run whose stages with batches all have two epochs of such batches."""
    tree = {
        "name": "t",
        "method": method,
        "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1},
        "generator": {"kind": "infogan", "latent_dim": D, "width": 4},
        "loss": {"kind": "bernoulli"},
        "sampler": {"kind": "prior"},
        "engine": {"kind": kind, "zero": zero},
        "cluster": {"workers": world},
    }
    batches = {"epochs": 2, "batch_size": BATCH}
    sections = {
        "autoencoder": batches | {"lr": LR},
        "networks": batches | {"generator_lr": LR, "content": 0.1, "critic": {"width": 4, "lr": LR}},
        "pixels": batches | {"lr": LR},
    }
    for name in METHODS[method]:
        if name in sections:
            tree[name] = sections[name] | keys.get(name, {})
    return tree | {name: value for name, value in keys.items() if name not in sections}


def test_two_workers_end_where_one_ends(local_ray, gloo_group):
    cases = [("autoencoder", zero, resumed) for zero, resumed in ((0, False), (1, True), (2, False), (3, True))]
    cases += [("vae-gan", 0, False), ("vae-gan", 2, True), ("aae", 0, False), ("aae", 3, True)]
    cases += [("ae-ot-gan", 0, False), ("ae-ot-gan", 3, True), ("imle-pixels", 1, True)]
    alone = {case: train(0, 1, "torch", 0, False, case) for case in CASES}
    with gloo_group(2) as members:
        for case, zero, resumed in cases:
            losses, kept, updates, codes = alone[case]
            ends = [
                member.run.remote(train, rank, 2, "deepspeed", zero, resumed, case)
                for rank, member in enumerate(members)
            ]
            answers = local_ray.get(ends, timeout=600)
            print(f"{case} zero {zero} resumed {resumed}")
            found = np.concatenate([answer[3] for answer in answers])
            np.testing.assert_allclose(found, codes, atol=2e-3 * np.abs(codes).max(), rtol=1e-2)
            for answer in answers:
                assert answer[2] == updates
                np.testing.assert_allclose(answer[0], losses, rtol=1e-3, atol=1e-4)
                assert answer[1].keys() == kept.keys()
                for name, tensor in kept.items():
                    if "exp_avg" in name:
                        atol = 1e-3 * np.abs(tensor).max()
                        np.testing.assert_allclose(answer[1][name], tensor, atol=atol, rtol=1e-3, err_msg=name)
                        continue
                    # a tenth of one of Adam's steps, which are as long where a gradient is rounding noise: there whole
                    # ones may differ, of a number in 100,000
                    apart = np.abs(answer[1][name] - tensor) - 1e-3 * np.abs(tensor)
                    assert apart.max() < LR, name
                    assert (apart > LR / 10).mean() < 1e-5, name
