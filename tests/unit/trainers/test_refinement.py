"""The refinement of a decoder against a critic (AE-OT-GAN): it starts from the decoder, its first step is that of a
reference in float64, its rows carry their own codes as often as asked, and a resumed run ends bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import Share, stratified_plan
from glann.config.run import validate
from glann.errors import UserError
from glann.models.critics import critic_of
from glann.models.encoders import encoder_of
from glann.models.generators import generator_of
from glann.models.noise import Stream, noise, uniform
from glann.samplers.base import build_network
from glann.trainers.autoencoder import Autoencoder
from glann.trainers.networks import Networks
from glann.trainers.rounds import Game
from glann.trainers.sampler import SamplerStage
from glann.trainers.stage import StageContext
from stage_runs import run, tensors
from torch.nn import functional as F
from toy_images import ToyImages

ROWS, BATCH, D = 13, 6, 5  # three steps an epoch


def config(sampler: dict[str, Any] | None = None, **keys: Any):
    networks = {
        "epochs": 2,
        "batch_size": BATCH,
        "critic": {"width": 4},
        "generated": 1.5,
        "content": 0.7,
        "encoder_features": 0.3,
    }
    tree = {
        "name": "t",
        "method": "ae-ot-gan",
        "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1},
        "generator": {"kind": "infogan", "latent_dim": D, "width": 4},
        "loss": {"kind": "l2"},
        "autoencoder": {"epochs": 3, "batch_size": 5, "kl": 0},
        "networks": networks | keys,
        "sampler": sampler or {"kind": "ot", "epochs": 1, "steps": 3},
        "engine": {"kind": "torch"},
    }
    return validate(tree, "test")


def earlier(settings) -> tuple[StageContext, dict[str, Any]]:
    """The stages before: the context, and states of their networks."""
    table = LatentTable.in_process(range(ROWS), D, 0, optimizer="none", constraint="none")
    context, networks = StageContext(settings, ToyImages(ROWS), table, torch.device("cpu")), dict[str, Any]()
    for kind in (Autoencoder, SamplerStage):
        made = kind(context, networks)
        for _ in made.steps(0, 0, lambda: torch.zeros(2)):
            pass
        networks |= made.state()
    return context, networks


def doubled(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    network.load_state_dict(weights)
    return network.double()


def test_it_starts_from_the_decoder_with_an_optimiser_of_its_own():
    context, networks = earlier(config())
    made = Networks(context, networks)
    state = made.state()
    assert state["generator"]["updates"] == 0
    weights = networks["generator"]["weights"]
    assert networks["generator"]["updates"] > 0
    assert all(torch.equal(weights[name], state["generator"]["weights"][name]) for name in weights)
    assert not any(moment.any() for moment in state["generator"]["exp_avg"].values())


def test_the_first_step_is_that_of_the_published_losses():
    settings = config(critic={"width": 4, "lr": 1e-9})  # so that G meets the critic as it is
    settings = settings.model_copy(update={"generator": settings.generator.model_copy(update={"batch_norm": False})})
    context, networks = earlier(settings)
    generator = doubled(generator_of(settings), networks["generator"]["weights"]).train()
    encoder = doubled(encoder_of(settings), networks["encoder"]["weights"]).eval()
    sampler = build_network(settings.sampler, D, "none")
    sampler.load_state_dict(networks["mapping"]["weights"])
    torch.manual_seed(settings.seed + 2)
    critic, keys = critic_of(settings).double().train(), settings.networks

    planned = stratified_plan(settings.seed, 0, ROWS, BATCH, Share(BATCH, 0, 1))[0]
    rows = torch.from_numpy(planned.rows_B[planned.weight_B > 0])
    real = torch.from_numpy(np.stack([ToyImages(ROWS).decode(row) for row in rows.tolist()])).double() / 255
    own = context.latents.gather(rows.numpy()).double()

    def codes(draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        chance = uniform(noise(settings.seed, draw, rows, 1, stream=Stream.PAIRED)[:, 0])
        fresh = sampler(noise(settings.seed, draw, rows, sampler.noise_dim, stream=Stream.PRIOR)).double()
        paired = chance < 1 / 2.5
        return torch.where(paired[:, None], own, fresh), paired

    judged = critic(generator(codes(0)[0])).score_B
    critic_loss = (F.softplus(-critic(real).score_B) + F.softplus(judged)).mean()
    code, paired = codes(1)
    fake = generator(code)
    assert 0 < paired.sum() < len(paired)
    content = (fake - real).square().flatten(1).mean(1)
    apart = (encoder(fake) - code).square().mean(1)
    adversarial = F.softplus(-critic(fake).score_B)
    loss = (adversarial + 0.7 * 2.5 * paired * content + 0.3 * apart).mean()

    made = Networks(context, networks)
    [step] = run(made, count=1)
    assert step.loss == pytest.approx(critic_loss.item(), rel=1e-4)
    named = dict(generator.named_parameters())
    played = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    moments = made.lazy_state()["generator"]["exp_avg"]
    for name, gradient in played.items():
        wanted = (1 - keys.betas[0]) * gradient
        atol = 2e-4 * float(wanted.abs().max()) + 1e-9
        np.testing.assert_allclose(moments[name].whole(), wanted, atol=atol, rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("keys", [{}, {"ema": 0.5, "generator_steps": 2, "critic": {"width": 4, "batch_norm": True}}])
def test_a_resumed_run_ends_bit_for_bit_and_changes_no_code(keys):
    settings = config(**keys)
    context, networks = earlier(settings)
    codes = context.latents.codes()
    straight = Networks(context, networks)
    done = run(straight)
    assert {"critic_gap", "content", "encoder_features", "generator_loss"} <= done[-1].facts.keys()
    first = Networks(context, networks)
    run(first, count=4)
    second = Networks(context, networks | first.state())
    run(second, 1, 1)
    wanted, found = tensors(straight.state()), tensors(second.state())
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert torch.equal(context.latents.codes(), codes)
    assert straight.previews()["samples"]


def test_one_row_in_four_carries_its_own_code():
    context, networks = earlier(config(generated=3.0))
    game = Game.of(context.config, context.images, Networks(context, networks).generator)
    from glann.trainers.rounds import Round

    rows = torch.arange(20_000)
    now = Round(game, 3, rows, torch.zeros(1), rows, torch.ones(20_000), 1.0)
    shares = [float(now.paired(draw).float().mean()) for draw in (0, 1)]
    assert shares == pytest.approx([0.25, 0.25], abs=0.01)
    assert not torch.equal(now.paired(0), now.paired(1))


def test_content_is_held_while_the_critic_pulls():
    """The term keeps reconstructions where they were: without it they leave."""
    ends = []
    for content in (0.0, 50.0):
        context, networks = earlier(config(content=content, epochs=12, generator_lr=0.02, encoder_features=0.0))
        done = run(Networks(context, networks))
        ends.append([step.facts["content"] for step in done if "content" in step.facts][-1])
    print(ends)
    assert ends[1] < 0.7 * ends[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"networks": {"epochs": 1, "condition": True}}, "of method=gan"),
        (
            {"networks": {"epochs": 1, "batch_size": 1}, "cluster": {"workers": 2}},
            r"networks\.batch_size=1 leaves no row",
        ),
        ({"networks": None}, r"networks\.epochs"),
        ({"sampler": {"kind": "prior"}}, "such as gmm or ot"),
        ({"glo": {"epochs": 1}}, r"glo\.\* are keys of another method"),
        ({"method": "gan", "sampler": {"kind": "prior"}, "autoencoder": None, "loss": None}, r"set method=ae-ot-gan"),
    ],
)
def test_impossible_combinations_are_refused_by_name(changes, words):
    tree = config().model_dump(mode="json") | {"engine": {}} | changes
    with pytest.raises(UserError, match=words) as refused:
        validate({key: value for key, value in tree.items() if value is not None}, "test")
    assert "\n" not in str(refused.value)
