"""Exact likelihoods are exact: the entropy of a Gaussian, densities that integrate to one, inverses, order of axes."""

from __future__ import annotations

import math

import pytest
import torch
from code_clouds import build, fitted
from glann.models.autoregressive import Autoregressive
from glann.models.coupling import CouplingFlow, axis_order
from glann.models.mixtures import mixture_log_density, mixture_normal, mixture_of, mixture_quantile

KINDS = {
    "coupling": {"layers": 4, "hidden_dim": 48, "depth": 1},
    "coupling mixture": {"layers": 2, "components": 3, "hidden_dim": 48, "depth": 1},
    "ar": {"components": 3, "hidden_dim": 48, "depth": 2},
}
CASES = pytest.mark.parametrize("case", KINDS)


@CASES
def test_the_entropy_of_a_gaussian(case):
    """Within 0.02 nat per dimension, on codes that were not trained on."""
    torch.manual_seed(0)
    dim = 4
    root_DD = 0.05 * (torch.eye(dim) + 0.6 * torch.randn(dim, dim))
    mean_D = 0.1 * torch.randn(dim)
    z_ND, fresh_ND = (mean_D + torch.randn(rows, dim) @ root_DD.T for rows in (6000, 40_000))
    sampler = fitted(case.split()[0], z_ND, epochs=15, lr=4e-3, blur=0.0, **KINDS[case])
    entropy = 0.5 * dim * (1 + math.log(2 * math.pi)) + float(root_DD.double().det().abs().log())
    assert float(sampler.nll(fresh_ND).mean() - entropy) / dim == pytest.approx(0, abs=0.02)


@CASES
def test_the_density_in_a_plane_has_the_mass_one(case):
    torch.manual_seed(0)
    sampler = build(case.split()[0], 2, **KINDS[case])
    for parameter in sampler.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    side = torch.linspace(-12, 12, 601)
    x_B2 = torch.cartesian_prod(side, side)
    mass = sum(float((-sampler.network.nll(part)).exp().double().sum()) for part in x_B2.split(50_000))
    assert mass * 0.04**2 == pytest.approx(1, abs=0.02)


@CASES
def test_draws_have_the_density(case):
    """The mean of a function over draws is its integral under the density."""
    torch.manual_seed(0)
    network = build(case.split()[0], 2, **KINDS[case]).network
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.scale.fill_(1e-3)  # inside the ball, where the projection changes nothing
    drawn_B2 = network.eval()(torch.randn(40_000, 2)) / 1e-3
    side = torch.linspace(-12, 12, 601)
    x_B2 = torch.cartesian_prod(side, side)
    density_B = torch.cat([(-network.nll(part)).exp() for part in x_B2.split(50_000)]).double() * 0.04**2
    for of in (lambda x: x[:, 0].tanh(), lambda x: (x[:, 0] * x[:, 1]).tanh(), lambda x: x[:, 1].sin()):
        expected = float((of(x_B2).double() * density_B).sum())
        assert float(of(drawn_B2).mean()) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("components", [1, 4])
def test_a_coupling_flow_inverts_itself(components):
    """The noise behind a draw is found again: its density under N(0, I) and the volumes of the layers are the nll."""
    torch.manual_seed(0)
    network = CouplingFlow(5, 4, components, 16, 2, "ball")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.scale.fill_(1e-4)
    e_BE = torch.randn(6, 5)
    x_BD = network(e_BE) / 1e-4
    jacobians = [torch.autograd.functional.jacobian(lambda e: network(e[None])[0] / 1e-4, e_E) for e_E in e_BE]
    volume_B = torch.stack([jacobian.double().det().abs().log() for jacobian in jacobians])
    expected_B = 0.5 * e_BE.square().sum(1) + 2.5 * math.log(2 * math.pi) + volume_B
    if components == 1:  # bisection has no derivative
        torch.testing.assert_close(network.nll(x_BD).double(), expected_B.double(), atol=1e-3, rtol=1e-3)
    at_BD = torch.linspace(-3, 3, 30).view(6, 5)
    parts = mixture_of(torch.randn(6, 5, 3 * 4), 4)
    back_BD = mixture_normal(mixture_quantile(torch.special.ndtr(at_BD.double()), *parts), *parts)
    torch.testing.assert_close(back_BD, at_BD, atol=2e-3, rtol=0)


def test_the_normal_number_of_a_mixture_is_exact_far_out():
    """Of one Gaussian it is (x - m) / s, at any distance on both sides."""
    x_BA = torch.tensor([[-30.0, -8.0, 0.5, 9.0, 30.0]])
    parts = (torch.zeros(1, 5, 1), torch.full((1, 5, 1), 0.5), torch.ones(1, 5, 1))
    torch.testing.assert_close(mixture_normal(x_BA, *parts), x_BA - 0.5, atol=1e-4, rtol=0)
    log_BA = mixture_log_density(x_BA, *parts)
    torch.testing.assert_close(log_BA, -0.5 * (x_BA - 0.5).square() - 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_the_mixture_of_an_axis_depends_on_the_axes_before_it_only(dim):
    torch.manual_seed(0)
    network = Autoregressive(dim, 2, 32, 3, "ball")
    x_D = torch.randn(dim)
    jacobian_DKD = torch.autograd.functional.jacobian(lambda x: network.mixtures(x[None])[1][0], x_D)
    influence_DD = jacobian_DKD.abs().sum(1)
    assert torch.equal(influence_DD > 0, torch.ones(dim, dim).tril(-1) > 0)


def test_every_axis_is_moved_by_a_pair_of_layers():
    for dim in (2, 5, 64):
        for layer in range(0, 8, 2):
            moved = [set(axis_order(dim, number)[0][dim // 2 :]) for number in (layer, layer + 1)]
            assert moved[0] | moved[1] == set(range(dim))
        for layer in range(8):
            order, back = axis_order(dim, layer)
            assert [order[at] for at in back] == list(range(dim))


def test_blur_is_new_in_every_epoch_and_the_same_for_a_row():
    from glann.samplers.adam import Batch

    sampler = build("ar", 3, blur=0.5)
    whole = Batch(0, torch.arange(6).numpy(), torch.arange(6), torch.zeros(6, 3))
    part = Batch(0, torch.arange(6).numpy(), torch.tensor([4, 1]), torch.zeros(2, 3))
    torch.testing.assert_close(sampler.loss(part), sampler.loss(whole)[[4, 1]])
    later = Batch(1, torch.arange(6).numpy(), torch.arange(6), torch.zeros(6, 3))
    assert not torch.allclose(sampler.loss(later), sampler.loss(whole))
