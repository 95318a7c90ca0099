"""The Gaussian sampler has the moments of the codes, and so it does where the codes lie on several workers."""

from __future__ import annotations

import torch
from glann.config.samplers import GaussianConfig
from glann.samplers.base import Codes, build_network, build_sampler
from glann.samplers.gaussian import gaussian

CPU = torch.device("cpu")


def fit(z_ND: torch.Tensor, constraint: str = "ball"):
    sampler = build_sampler(GaussianConfig(), z_ND.shape[1], constraint, seed=0, device=CPU)
    steps = list(sampler.fit(Codes(z_ND, range(len(z_ND)), len(z_ND)), 0, lambda: torch.tensor([1.0, 0.0])))
    return sampler, steps


def test_it_is_fitted_in_one_step_that_carries_the_piggyback():
    z_ND = torch.randn(37, 5)
    sampler, (step,) = fit(z_ND)
    assert (step.epoch, step.step, step.steps, step.applied) == (0, 0, 1, True)
    assert step.piggyback_K.tolist() == [1.0, 0.0]
    variance = torch.cov(z_ND.double().T).trace()
    torch.testing.assert_close(torch.tensor(step.epoch_facts["loss"]).double(), variance, rtol=1e-5, atol=0)
    assert list(sampler.fit(Codes(z_ND, range(37), 37), 1, lambda: torch.zeros(0))) == []  # there is no second epoch


def test_codes_of_normal_noise_have_the_moments_of_the_codes():
    z_ND = 0.05 * torch.randn(500, 4) @ torch.randn(4, 4) + 0.1
    sampler, _ = fit(z_ND)
    drawn_ND = sampler.codes(torch.randn(40_000, 4))
    torch.testing.assert_close(drawn_ND.mean(0), z_ND.mean(0), atol=5e-3, rtol=0)
    torch.testing.assert_close(torch.cov(drawn_ND.T), torch.cov(z_ND.T), atol=5e-3, rtol=0.1)


def test_its_state_makes_the_same_sampler():
    z_ND = torch.randn(20, 3)
    sampler, _ = fit(z_ND, "sphere")
    network = build_network(GaussianConfig(), 3, "sphere")
    network.load_state_dict(sampler.state()["weights"])
    e_BE = torch.randn(6, 3)
    assert torch.equal(network(e_BE), sampler.codes(e_BE))
    torch.testing.assert_close(network(e_BE).norm(dim=1), torch.ones(6))


def test_moments_equal_a_reference_in_float64():
    z_ND = torch.randn(101, 7)
    fitted = gaussian(z_ND)
    covariance = torch.cov(z_ND.double().T)
    torch.testing.assert_close(fitted["mean"].double(), z_ND.double().mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close((fitted["root"] @ fitted["root"].T).double(), covariance, atol=1e-5, rtol=1e-5)
