"""Encoders: the mirror of every kind of generator, and distributions of codes as an independent library has them."""

from __future__ import annotations

import pytest
import torch
from glann.config.run import validate
from glann.config.sections import GeneratorConfig
from glann.errors import UserError
from glann.models.encoders import Encoder, Posterior, encoder_of
from glann.models.generators import build_generator
from torch import distributions
from torch.nn import functional as F

D = 6


def outputs(rows: int = 5) -> torch.Tensor:
    return 3 * torch.randn(rows, 2 * D, generator=torch.Generator().manual_seed(0))


def test_the_divergence_is_that_of_normal_distributions():
    """Against torch.distributions in float64."""
    out_BO = outputs()
    wide = out_BO.double()
    there = distributions.Normal(wide[:, :D], F.softplus(wide[:, D:]) + 1e-6)
    expected = distributions.kl_divergence(there, distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(Posterior.of(out_BO, D).divergence().double(), expected, rtol=1e-5, atol=1e-5)


def test_its_gradient_is_that_of_normal_distributions():
    out_BO, wide = outputs().requires_grad_(), outputs().double().requires_grad_()
    there = distributions.Normal(wide[:, :D], F.softplus(wide[:, D:]) + 1e-6)
    distributions.kl_divergence(there, distributions.Normal(0.0, 1.0)).sum().backward()
    Posterior.of(out_BO, D).divergence().sum().backward()
    torch.testing.assert_close(out_BO.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_codes_are_drawn_with_mean_and_deviation():
    posterior = Posterior.of(outputs(1), D)
    e_BD = torch.randn(20_000, D, generator=torch.Generator().manual_seed(1))
    drawn = posterior.draw(e_BD)
    torch.testing.assert_close(drawn.mean(0), posterior.mean_BD[0], atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std(0), posterior.deviation_BD[0], rtol=0.03, atol=0)


def test_a_code_without_a_deviation_is_a_point():
    posterior = Posterior.of(outputs()[:, :D], D)
    assert torch.equal(posterior.draw(torch.ones(5, D)), posterior.mean_BD)
    assert posterior.divergence().tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("kind", "resolution", "channels", "batch_norm"),
    [("infogan", 28, 1, True), ("infogan", 64, 3, False), ("resnet", 64, 3, True)],
)
def test_an_encoder_takes_what_its_generator_makes(kind, resolution, channels, batch_norm):
    config = GeneratorConfig(kind=kind, latent_dim=D, width=4, batch_norm=batch_norm)
    encoder = Encoder(config, D, resolution, channels).eval()
    images = build_generator(config, resolution, channels).eval()(torch.randn(3, D))
    code_BD = encoder(images)
    assert code_BD.shape == (3, D)
    torch.testing.assert_close(encoder(images[1:2]), code_BD[1:2])  # no row depends on its mates
    normalises = any("norm" in name for name, _ in encoder.named_buffers())
    assert normalises == (batch_norm and kind == "infogan")
    code_BD.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())  # nothing is left untrained


def test_an_encoder_of_points_has_half_the_outputs():
    tree = {
        "name": "t",
        "method": "autoencoder",
        "data": {"url": "x", "resolution": 28, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": D, "width": 4},
        "loss": {"kind": "l2"},
        "autoencoder": {"epochs": 1},
        "sampler": {"kind": "gaussian"},
    }
    images = torch.rand(2, 1, 28, 28)
    assert encoder_of(validate(tree, "test"))(images).shape == (2, 2 * D)
    tree["autoencoder"] = {"epochs": 1, "kl": 0}
    assert encoder_of(validate(tree, "test"))(images).shape == (2, D)


def test_an_encoder_refuses_images_that_it_cannot_see():
    with pytest.raises(UserError, match="power of two"):
        Encoder(GeneratorConfig(kind="resnet", latent_dim=D), D, 28, 1)
