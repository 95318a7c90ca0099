"""The stage of an encoder and the generator behind it: the two steps are one of their common loss, the table holds the
encoder's codes, and a resumed run ends bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import Share, stratified_plan
from glann.config.run import validate
from glann.errors import UserError
from glann.models.encoders import encoder_of
from glann.models.generators import generator_of
from glann.models.noise import Stream, noise
from glann.trainers.autoencoder import Autoencoder
from glann.trainers.stage import StageContext
from stage_runs import run, tensors
from torch import distributions
from torch.nn import functional as F
from toy_images import ToyImages

ROWS, BATCH, D = 13, 6, 5  # three steps an epoch


def config(loss: str = "bernoulli", **keys: Any):
    tree = {
        "name": "t",
        "method": "autoencoder",
        "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1, "max_bad_fraction": 0.1},
        "generator": {"kind": "infogan", "latent_dim": D, "width": 4},
        "loss": {"kind": loss},
        "autoencoder": {"epochs": 2, "batch_size": BATCH, "kl": 0.7} | keys,
        "sampler": {"kind": "gaussian"},
        "engine": {"kind": "torch"},
    }
    return validate(tree, "test")


def stage(settings, networks: dict[str, Any] | None = None, images: Any = None) -> Autoencoder:
    table = LatentTable.in_process(range(ROWS), D, 0, optimizer="none", constraint="none")
    context = StageContext(settings, images or ToyImages(ROWS), table, torch.device("cpu"))
    return Autoencoder(context, networks or {})


def reference(settings, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and gradients of the first step, of plain PyTorch in float64: one graph, one loss, one Adam."""
    torch.manual_seed(settings.seed)
    generator = generator_of(settings).double().train()
    torch.manual_seed(settings.seed + 2)
    encoder = encoder_of(settings).double().train()
    keys, images, losses, gradients = settings.autoencoder, ToyImages(ROWS), [], {}
    adam = torch.optim.Adam([*generator.parameters(), *encoder.parameters()], lr=keys.lr, betas=keys.betas)
    for planned in stratified_plan(settings.seed, 0, ROWS, BATCH, Share(BATCH, 0, 1))[:steps]:
        rows = planned.rows_B[planned.weight_B > 0]
        real = torch.from_numpy(np.stack([images.decode(row) for row in rows])).double() / 255
        e_BD = noise(settings.seed, 0, torch.from_numpy(rows), D, stream=Stream.POSTERIOR).double()
        out = encoder(real)
        there = distributions.Normal(out[:, :D], F.softplus(out[:, D:]) + 1e-6)
        fake = generator(there.mean + there.stddev * e_BD)
        nats = F.binary_cross_entropy(fake, real, reduction="none").flatten(1).sum(1)
        kl = distributions.kl_divergence(there, distributions.Normal(0.0, 1.0)).sum(1)
        loss = (nats + keys.kl * kl).mean()
        adam.zero_grad()
        loss.backward()
        for network, module in (("generator", generator), ("encoder", encoder)):
            for name, parameter in module.named_parameters():
                gradients.setdefault(f"{network} {name}", parameter.grad.clone())
        adam.step()
        losses.append(loss.item())
    return losses, gradients


def test_the_two_steps_are_one_of_the_common_loss():
    """The gradient that the generator returns for its codes is all that the encoder needs; BatchNorm in both."""
    settings = config()
    made = stage(settings)
    losses, gradients = reference(settings, 3)
    done = run(made, count=1)
    for network, state in made.lazy_state().items():
        for name, moment in state["exp_avg"].items():  # after one step (1 - beta1) times the gradient
            expected = (1 - settings.autoencoder.betas[0]) * gradients[f"{network} {name}"]
            atol = 1e-4 * float(expected.abs().max())
            np.testing.assert_allclose(moment.whole(), expected, atol=atol, rtol=1e-3, err_msg=f"{network} {name}")
    done += run(made, 0, 1, count=2)
    np.testing.assert_allclose([step.loss for step in done], losses, rtol=1e-4)


def test_an_epoch_visits_every_row_and_reports_both_parts_of_the_loss():
    done = run(stage(config()), count=3)
    assert [step.ends_epoch for step in done] == [False, False, True]
    assert all(step.applied and step.piggyback_K.tolist() == [1.0, 0.0, 2.0] for step in done)
    assert sorted(row for step in done for row in step.rows_B) == list(range(ROWS))
    facts = done[-1].facts
    assert facts.keys() == {"reconstruction", "kl"}
    mean = sum(step.loss for step in done) / 3
    assert mean == pytest.approx(facts["reconstruction"] + 0.7 * facts["kl"], rel=1e-6)


def test_training_lowers_the_loss():
    done = run(stage(config("l2", epochs=10, kl=0, lr=0.01)))
    assert done[-1].loss < 0.6 * done[0].loss


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_a_resumed_run_ends_bit_for_bit(kl):
    settings = config("l2", kl=kl)
    whole = stage(settings)
    run(whole)
    first = stage(settings)
    run(first, count=4)
    second = stage(settings, first.state())
    run(second, 1, 1)
    ends = tensors(whole.state()), tensors(second.state())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert torch.equal(whole.context.latents.codes(), second.context.latents.codes())


def test_the_table_holds_the_means_that_the_trained_encoder_gives():
    settings = config()
    made = stage(settings)
    run(made)
    state = made.state()
    encoder = encoder_of(settings)
    encoder.load_state_dict(state["encoder"]["weights"])
    images = np.stack([made.context.images.decode(row) for row in range(ROWS)])
    with torch.no_grad():
        expected = encoder.eval()(torch.from_numpy(images).float() / 255)[:, :D]
    torch.testing.assert_close(made.context.latents.codes(), expected, rtol=1e-4, atol=1e-5)


def test_rows_have_the_codes_of_their_last_visit_while_it_trains():
    """A checkpoint of the middle of an epoch can be drawn from."""
    made = stage(config())
    before = made.context.latents.codes()
    [step] = run(made, count=1)
    moved = (made.context.latents.codes() != before).any(1)
    assert moved.nonzero()[:, 0].tolist() == sorted(step.rows_B)


def test_an_unreadable_image_keeps_its_code_and_stops_nothing():
    from glann.datasets.reader import CorruptImage

    class OneBroken(ToyImages):
        def decode(self, row):
            if row == 3:
                raise CorruptImage(row, "key", "broken")
            return super().decode(row)

    made = stage(config(), images=OneBroken(ROWS))
    before = made.context.latents.codes()
    done = run(made)
    assert all(step.applied and 3 not in step.rows_B for step in done)
    made.state()
    after = made.context.latents.codes()
    assert torch.equal(after[3], before[3])
    assert (after != before).any(1).sum() == ROWS - 1


def test_a_step_that_is_not_finite_moves_neither_network_and_no_code(monkeypatch):
    made = stage(config())
    before, codes = tensors(made.state()), made.context.latents.codes()
    monkeypatch.setattr(made, "loss", lambda fake, real, seeds: fake.flatten(1).sum(1) * torch.nan)
    with pytest.raises(UserError, match=r"5 steps in a row.*lower autoencoder.lr"):
        run(made)
    after = tensors(made.state())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(made.context.latents.codes(), codes)


def test_a_prior_needs_a_divergence():
    tree = config().model_dump() | {"sampler": {"kind": "prior"}}
    validate(tree, "test")
    tree["autoencoder"]["kl"] = 0
    with pytest.raises(UserError, match=r"autoencoder\.kl=0 leaves codes anywhere.*such as gmm or ot"):
        validate(tree, "test")
    tree |= {"autoencoder": {"epochs": 1}, "sampler": {"kind": "prior", "shape": "uniform"}}
    with pytest.raises(UserError, match=r"towards N\(0, I\); set sampler\.shape=normal"):
        validate(tree, "test")
