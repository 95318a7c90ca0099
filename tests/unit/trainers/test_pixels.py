"""IMLE in the space of images: every row has the code of the nearest image that G made, and a run that is resumed
within an epoch keeps its pairs."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.config.run import validate
from glann.errors import UserError
from glann.models.generators import generator_of
from glann.models.noise import Stream, noise
from glann.trainers.pixels import Pixels, candidates
from glann.trainers.stage import StageContext
from toy_images import ToyImages

ROWS, BATCH, D = 13, 6, 5  # three steps an epoch


def config(**keys: Any):
    tree = {
        "name": "t",
        "method": "imle-pixels",
        "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1},
        "generator": {"kind": "infogan", "latent_dim": D, "width": 4},
        "loss": {"kind": "l2"},
        "pixels": {"epochs": 2, "batch_size": BATCH} | keys,
        "sampler": {"kind": "prior"},
        "engine": {"kind": "torch"},
    }
    return validate(tree, "test")


def table() -> LatentTable:
    return LatentTable.in_process(range(ROWS), D, 0, optimizer="none", constraint="none")


def stage(settings, networks: dict[str, Any] | None = None, codes: LatentTable | None = None) -> Pixels:
    context = StageContext(settings, ToyImages(ROWS), codes or table(), torch.device("cpu"))
    return Pixels(context, networks or {})


def run(made: Pixels, epoch: int = 0, step: int = 0, count: int | None = None):
    return list(islice(made.steps(epoch, step, lambda: torch.tensor([1.0, 2.0])), count))


@pytest.mark.parametrize("side", [28, 14])
def test_a_row_takes_the_code_of_the_nearest_image(side):
    """By a search in float64 over all candidates; compared as they are, or averaged down."""
    settings = config(side=side)
    made = stage(settings)
    generator = generator_of(settings)
    generator.load_state_dict(made.generator.weights())
    [step] = run(made, count=1)
    assert step.piggyback_K.tolist() == [1.0, 2.0]

    number = candidates(settings, ROWS)
    assert number == 2 * ROWS
    z_MD = noise(settings.seed, 0, torch.arange(number), D, stream=Stream.CANDIDATES)
    with torch.no_grad():
        fake = generator.eval()(z_MD).double()
    real = torch.from_numpy(np.stack([made.context.images.decode(row) for row in range(ROWS)])).double() / 255
    fake, real = (torch.nn.functional.adaptive_avg_pool2d(images, side).flatten(1) for images in (fake, real))
    nearest = torch.cdist(real, fake).argmin(1)
    assert torch.equal(made.context.latents.codes(), z_MD[nearest])
    assert made.distances["distance"] > 0


def test_training_brings_the_images_nearer():
    done = run(stage(config(epochs=12, lr=0.005)))
    distances = [step.facts["distance"] for step in done if step.ends_epoch]
    assert len(distances) == 12
    assert distances[-1] < 0.5 * distances[0]


def test_a_run_that_is_resumed_within_an_epoch_ends_bit_for_bit():
    settings = config()
    whole = stage(settings)
    run(whole)
    first = stage(settings)
    run(first, count=4)
    codes = table()
    codes.restore(first.context.latents.snapshot())
    second = stage(settings, first.state(), codes)
    run(second, 1, 1)
    ends = [made.state()["generator"] for made in (whole, second)]
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(ends[0][group][name], ends[1][group][name]) for name in ends[0][group])
    assert torch.equal(whole.context.latents.codes(), codes.codes())


def test_another_sampler_than_the_prior_is_refused():
    tree = config().model_dump() | {"sampler": {"kind": "gmm"}}
    with pytest.raises(UserError, match=r"codes of a fixed distribution; set sampler\.kind=prior"):
        validate(tree, "test")
