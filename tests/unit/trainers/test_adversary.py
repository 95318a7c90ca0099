"""Autoencoders with a critic, of images (VAE-GAN) and of codes (adversarial autoencoder): the first step is that of a
reference in float64, resumed runs end bit for bit, and bad combinations are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import Share, stratified_plan
from glann.config.run import validate
from glann.errors import UserError
from glann.models.critics import adversary_of
from glann.models.encoders import encoder_of
from glann.models.generators import generator_of
from glann.models.noise import Stream, noise
from glann.trainers.autoencoder import Autoencoder
from glann.trainers.stage import StageContext
from stage_runs import run, tensors
from torch.nn import functional as F
from toy_images import ToyImages

ROWS, BATCH, D = 13, 6, 5  # three steps an epoch
CODES = {"judges": "codes", "weight": 0.6, "critic": {"kind": "mlp", "width": 7}}
IMAGES = {"judges": "images", "weight": 0.6, "features": 0.3, "critic": {"kind": "infogan", "width": 4}}


def config(adversary: dict[str, Any], sampler: dict[str, Any] | None = None, engine: Any = None, **keys: Any):
    codes = adversary.get("judges") == "codes"
    section = {"epochs": 2, "batch_size": BATCH, "kl": 0.0 if codes else 0.7, "reconstruction": 0.4}
    tree = {
        "name": "t",
        "method": "autoencoder",
        "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1},
        "generator": {"kind": "infogan", "latent_dim": D, "width": 4},
        "loss": {"kind": "bernoulli"},
        "autoencoder": section | {"adversary": adversary} | keys,
        "sampler": sampler or {"kind": "prior"},
        "engine": {"kind": "torch"} | (engine or {}),
    }
    return validate(tree, "test")


def stage(settings, networks: dict[str, Any] | None = None) -> Autoencoder:
    table = LatentTable.in_process(range(ROWS), D, 0, optimizer="none", constraint="none")
    return Autoencoder(StageContext(settings, ToyImages(ROWS), table, torch.device("cpu")), networks or {})


def networks_of(settings) -> list[torch.nn.Module]:
    made = []
    for offset, build in ((0, generator_of), (2, encoder_of), (3, adversary_of)):
        torch.manual_seed(settings.seed + offset)
        made.append(build(settings).double().train())
    return made


def first_batch(settings) -> tuple[torch.Tensor, ...]:
    """Images, noise of the posterior, codes of the prior, and which codes judged are the images' own, of a batch."""
    planned = stratified_plan(settings.seed, 0, ROWS, BATCH, Share(BATCH, 0, 1))[0]
    rows = planned.rows_B[planned.weight_B > 0]
    real = torch.from_numpy(np.stack([ToyImages(ROWS).decode(row) for row in rows])).double() / 255
    drawn = [noise(settings.seed, 0, torch.from_numpy(rows), D, stream=s) for s in (Stream.POSTERIOR, Stream.PRIOR)]
    own = noise(settings.seed, 0, torch.from_numpy(rows), 1, stream=Stream.PAIRED) < 0
    assert 0 < own.sum() < len(rows)
    return real, drawn[0].double(), drawn[1].double(), own


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def after_a_step(critic: torch.nn.Module, slopes: dict[str, torch.Tensor], lr: float, betas) -> None:
    """One step of Adam from its start."""
    for name, parameter in critic.named_parameters():
        parameter.grad = slopes[name].clone()
    torch.optim.Adam(critic.parameters(), lr=lr, betas=betas).step()


def reference(settings) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of the three networks' losses in the first step, written down from the papers."""
    generator, encoder, critic = networks_of(settings)
    real, e_BD, fresh, own = first_batch(settings)
    keys = settings.autoencoder
    adversary, betas = keys.adversary, keys.betas
    out = encoder(real)
    mean = out[:, :D]
    if adversary.judges == "codes":
        code = mean
        judged = lambda z: critic(z[:, :, None, None]).score_B  # noqa: E731
        critic_loss = (F.softplus(-judged(fresh)) + F.softplus(judged(code.detach()))).mean()
        slopes = gradients(critic_loss, critic)
        after_a_step(critic, slopes, adversary.critic.lr, betas)
        nats = F.binary_cross_entropy(generator(code), real, reduction="none").flatten(1).sum(1).mean()
        g_loss = keys.reconstruction * nats
        e_loss = g_loss + adversary.weight * F.softplus(-judged(code)).mean()
        return {"generator": gradients(g_loss, generator), "encoder": gradients(e_loss, encoder), "adversary": slopes}
    deviation = F.softplus(out[:, D:]) + 1e-6
    code = mean + deviation * e_BD
    other = torch.where(own, code.detach(), fresh)
    score = lambda x: critic(x).score_B  # noqa: E731
    critic_loss = (F.softplus(-score(real)) + F.softplus(score(generator(other).detach()))).mean()
    slopes = gradients(critic_loss, critic)
    after_a_step(critic, slopes, adversary.critic.lr, betas)
    rebuilt, judged_images = generator(code), generator(other)
    nats = F.binary_cross_entropy(rebuilt, real, reduction="none").flatten(1).sum(1)
    like = 0.5 * (critic(rebuilt).features_BF - critic(real).features_BF.detach()).square().sum(1)
    rebuilding = (keys.reconstruction * nats + adversary.features * like).mean()
    g_loss = rebuilding + adversary.weight * F.softplus(-score(judged_images)).mean()
    kl = 0.5 * (mean.square() + deviation.square() - 1 - deviation.square().log()).sum(1).mean()
    e_loss = rebuilding + keys.kl * kl
    return {"generator": gradients(g_loss, generator), "encoder": gradients(e_loss, encoder), "adversary": slopes}


@pytest.mark.parametrize("adversary", [CODES, IMAGES], ids=["codes", "images"])
def test_the_first_step_is_that_of_the_published_losses(adversary):
    """Without BatchNorm, whose statistics go over more rows here than there: the encoder has none of the critic's part,
    where it judges images."""
    settings = config(adversary)
    settings = settings.model_copy(update={"generator": settings.generator.model_copy(update={"batch_norm": False})})
    made = stage(settings)
    [step] = run(made, count=1)
    assert step.applied
    assert step.piggyback_K.tolist() == [1.0, 0.0, 2.0]
    for network, expected in reference(settings).items():
        moments = made.lazy_state()[network]["exp_avg"]
        for name, gradient in expected.items():  # after one step (1 - beta1) times the gradient
            wanted = (1 - settings.autoencoder.betas[0]) * gradient
            atol = max(2e-4 * float(wanted.abs().max()), 1e-8)
            np.testing.assert_allclose(moments[name].whole(), wanted, atol=atol, rtol=2e-3, err_msg=f"{network} {name}")


@pytest.mark.parametrize("adversary", [CODES, IMAGES], ids=["codes", "images"])
def test_an_epoch_reports_the_parts_of_its_losses(adversary):
    done = run(stage(config(adversary)), count=3)
    wanted = {"reconstruction", "real_score", "fake_score", "critic_gap"}
    assert wanted | ({"kl", "features"} if adversary is IMAGES else set()) == done[-1].facts.keys()
    assert all(step.applied and np.isfinite(step.loss) for step in done)


@pytest.mark.parametrize("adversary", [CODES, IMAGES | {"penalty": {"kind": "r1"}}], ids=["codes", "images"])
def test_a_resumed_run_ends_bit_for_bit(adversary):
    settings = config(adversary | {"gate": 0.9})
    whole = stage(settings)
    run(whole)
    first = stage(settings)
    run(first, count=4)
    second = stage(settings, first.state())
    run(second, 1, 1)
    ends = tensors(whole.state()), tensors(second.state())
    assert ends[0].keys() == ends[1].keys()
    assert any(name.startswith("adversary weights") for name in ends[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert torch.equal(whole.context.latents.codes(), second.context.latents.codes())


def test_codes_of_an_adversarial_autoencoder_come_to_be_distributed_as_the_prior():
    """Without anything to reconstruct, the encoder's only task."""
    keys = {"epochs": 60, "reconstruction": 1e-6, "lr": 0.01, "betas": (0.5, 0.99)}
    adversary = CODES | {"weight": 1.0, "critic": {"kind": "mlp", "width": 32, "lr": 0.01}}
    made = stage(config(adversary, **keys))
    before = made.state() and made.context.latents.codes()
    run(made)
    made.state()
    after = made.context.latents.codes()
    spread = [float((codes.square().mean().sqrt() - 1).abs()) for codes in (before, after)]
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize(
    ("adversary", "keys", "words"),
    [
        (CODES | {"critic": {"kind": "infogan"}}, {}, r"adversary\.critic\.kind=mlp"),
        (CODES, {"kl": 1.0}, r"set autoencoder\.kl=0"),
        (CODES | {"features": 1.0}, {}, r"adversary\.judges=images"),
        (IMAGES | {"features": 0.0}, {"reconstruction": 0.0}, "nothing to reconstruct by"),
        (IMAGES | {"judges": "none"}, {}, "judges=none is without"),
        (IMAGES | {"critic": {"steps": 2}}, {}, "of method=gan"),
        (IMAGES | {"critic": {"kind": "resnet"}}, {}, r"autoencoder\.adversary\.critic\.kind=resnet"),
        (IMAGES | {"objective": {"kind": "hinge", "margin": 0.3}}, {}, r"autoencoder\.adversary\.objective\.margin"),
        (IMAGES, {"engine": {"accumulation": 2}}, r"engine\.accumulation=1"),
        (IMAGES, {"sampler": {"kind": "prior", "categories": 3}}, r"sampler\.categories=0"),
    ],
)
def test_impossible_combinations_are_refused_by_name(adversary, keys, words):
    with pytest.raises(UserError, match=words) as refused:
        config(adversary, **keys)
    assert "\n" not in str(refused.value)
