"""The mixture of Gaussians: its steps are those of expectation maximisation, and its draws are of the mixture."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from code_clouds import build, fitted, steps
from glann.errors import UserError
from glann.samplers.base import Codes
from glann.samplers.gmm import Mixture


def blobs(rows: int = 300) -> torch.Tensor:
    torch.manual_seed(0)
    centre_MD = 0.15 * torch.randn(3, 4)
    return centre_MD[torch.arange(rows) % 3] + 0.02 * torch.randn(rows, 4) @ torch.randn(4, 4)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_it_ends_where_scikit_learn_ends_from_the_same_start():
    from sklearn.mixture import GaussianMixture

    z_ND = blobs()
    sampler = build("gmm", 4, components=3, epochs=25, floor=1e-9)
    sampler.start(Codes(z_ND, range(300), 300), floor=1e-9)
    network = sampler.network
    precision_3DD = torch.linalg.inv(network.root.double() @ network.root.double().mT)
    reference = GaussianMixture(
        3,
        max_iter=25,
        tol=0,
        reg_covar=1e-9,
        weights_init=(network.weight.double() / network.weight.double().sum()).numpy(),
        means_init=network.mean.double().numpy(),
        precisions_init=precision_3DD.numpy(),
    ).fit(z_ND.double().numpy())
    done = steps(sampler, z_ND)
    assert len(done) == 25
    torch.testing.assert_close(network.weight.double(), torch.from_numpy(reference.weights_), atol=1e-4, rtol=0)
    torch.testing.assert_close(network.mean.double(), torch.from_numpy(reference.means_), atol=1e-4, rtol=0)
    covariance_3DD = (network.root @ network.root.mT).double()
    torch.testing.assert_close(covariance_3DD, torch.from_numpy(reference.covariances_), atol=1e-5, rtol=1e-3)
    nll = -float(network.log_joint(z_ND).logsumexp(1).mean())
    assert nll == pytest.approx(-reference.score(z_ND.double().numpy()), abs=1e-4)


def test_the_loss_falls_in_every_step():
    """Expectation maximisation never lowers the likelihood; the floor is too small to matter here."""
    losses = [step.epoch_facts["loss"] for step in steps(build("gmm", 4, components=5, floor=1e-9), blobs())]
    assert all(later <= before + 1e-5 for before, later in pairwise(losses))
    assert losses[-1] < losses[0] - 0.1


def test_draws_have_the_moments_of_the_mixture():
    z_ND = blobs()
    drawn_BD = fitted("gmm", z_ND, components=3).codes(torch.randn(40_000, 5))
    torch.testing.assert_close(drawn_BD.mean(0), z_ND.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(drawn_BD.T), torch.cov(z_ND.T), atol=0.02, rtol=0.1)


def test_the_first_number_of_the_noise_chooses_components_by_their_weights():
    network = Mixture(2, 3, "ball")
    network.weight.copy_(torch.tensor([0.2, 0.5, 0.3]))
    network.mean.copy_(torch.tensor([[0.1, 0], [0.2, 0], [0.3, 0]]))
    network.root.zero_()
    drawn_B2 = network(torch.cat([torch.randn(20_000, 1), torch.zeros(20_000, 2)], 1))
    shares = [(drawn_B2[:, 0] == network.mean[k, 0]).float().mean() for k in range(3)]
    torch.testing.assert_close(torch.stack(shares), network.weight, atol=0.015, rtol=0)
    extreme_B2 = network(torch.tensor([[-40.0, 0, 0], [40.0, 0, 0]]))
    assert torch.equal(extreme_B2, network.mean[[0, 2]])


def test_more_components_than_codes_are_refused():
    with pytest.raises(UserError, match=r"sampler\.components=50 is more than the 20 codes"):
        fitted("gmm", blobs(20))


def test_codes_in_a_plane_are_fitted():
    """A component on fewer dimensions than D has no Cholesky factor without the floor."""
    z_ND = torch.cat([0.3 * torch.randn(60, 2), torch.zeros(60, 2)], 1)
    drawn_BD = fitted("gmm", z_ND, components=4).codes(torch.randn(500, 5))
    assert bool(drawn_BD.isfinite().all())
    assert float(drawn_BD[:, 2:].std()) < 0.05
