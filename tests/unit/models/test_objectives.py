"""Objectives have the optima that their papers prove, on two distributions over five values; penalties are exact.

The critic is a table of one score per value, fitted in float64, so that every optimum can be compared to 1e-6.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from glann.config.networks import OBJECTIVES, ObjectiveConfig
from glann.models.objectives.base import Objective, Scores
from glann.models.objectives.divergences import DIVERGENCES
from glann.models.objectives.energy import began, energy
from glann.models.objectives.hinge import hinge
from glann.models.objectives.least_squares import least_squares
from glann.models.objectives.loss_sensitive import loss_sensitive
from glann.models.objectives.minimax import minimax, non_saturating
from glann.models.objectives.named import BUILDERS, objective_of
from glann.models.objectives.relativistic import relativistic
from glann.models.objectives.wasserstein import wasserstein
from glann.models.penalties import around, between, one_centred, penalty, slope, zero_centred
from glann.models.terms import feature_matching, likeness, pull_away
from scipy.optimize import linprog
from threaded_ranks import on_ranks
from torch import nn

P = torch.tensor([0.40, 0.30, 0.20, 0.08, 0.02], dtype=torch.float64)
Q = torch.tensor([0.10, 0.20, 0.25, 0.25, 0.20], dtype=torch.float64)
PLACES = torch.tensor([0.0, 1.0, 2.0, 4.0, 7.0], dtype=torch.float64)


def expected(objective: Objective, score_V: torch.Tensor) -> torch.Tensor:
    """The critic's loss over all pairs of a real and a generated value."""
    real, fake = (part.flatten() for part in torch.meshgrid(score_V, score_V, indexing="ij"))
    gap = (PLACES[:, None] - PLACES[None]).abs().flatten()
    return ((P[:, None] * Q[None]).flatten() * objective.critic(Scores(real, fake, gap))).sum()


def best(objective: Objective) -> tuple[torch.Tensor, float]:
    """The best table of scores, and its loss."""
    score_V = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [score_V], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = expected(objective, score_V)
        loss.backward()
        return loss

    solver.step(closure)
    return score_V.detach(), float(expected(objective, score_V.detach()))


def near(value: float, wanted: float) -> bool:
    return value == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("build", [minimax, non_saturating])
def test_the_best_critic_of_the_original_game_is_the_ratio(build):
    score_V, loss = best(build())
    torch.testing.assert_close(score_V, (P / Q).log(), atol=1e-6, rtol=0)
    assert near(loss, 1.1456329119)
    assert near(loss, 2 * math.log(2) - 2 * 0.1203307246)


def test_smoothed_labels_of_real_images_lower_the_best_critic():
    score_V, _ = best(non_saturating(smooth=0.9))
    torch.testing.assert_close(torch.sigmoid(score_V), 0.9 * P / (P + Q), atol=1e-6, rtol=0)


def test_generators_of_the_original_game_differ_in_what_they_saturate_at():
    scores = Scores(torch.zeros(2), torch.tensor([-20.0, 20.0]))
    torch.testing.assert_close(minimax().generator(scores), torch.tensor([-2.0612e-09, -20.0]), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(
        non_saturating().generator(scores), torch.tensor([20.0, 2.0612e-09]), atol=1e-8, rtol=1e-6
    )


def test_least_squares_finds_the_mean_target():
    score_V, loss = best(least_squares())
    torch.testing.assert_close(score_V, P / (P + Q), atol=1e-6, rtol=0)
    assert near(loss, 0.1949494949)
    score_V, _ = best(least_squares(-1, 1, 0))
    criterion = (P * score_V.square()).sum() + (
        Q * least_squares(-1, 1, 0).generator(Scores(score_V, score_V)) * 2
    ).sum()
    assert near(float(criterion), 0.4404040404)  # Pearson's chi^2 of p + q and 2 q
    assert near(float(criterion), float(((P - Q).square() / (P + Q)).sum()))


RATIO = P / Q
VALUES = {  # the divergence, and f'(p / q)
    "kl": (0.494322122, RATIO.log() + 1),
    "reverse-kl": (0.581439019, -1 / RATIO),
    "pearson": (1.2376, 2 * (RATIO - 1)),
    "neyman": (float(((P - Q).square() / P).sum()), 1 - RATIO**-2),
    "hellinger": (0.253554637, 1 - RATIO**-0.5),
    "js": (0.240661449, (2 * RATIO / (1 + RATIO)).log()),
    "gan": (-1.145632912, (RATIO / (1 + RATIO)).log()),
}


@pytest.mark.parametrize("name", VALUES)
def test_divergences_are_reached_at_the_derivative(name):
    value, best_T = VALUES[name]
    score_V, loss = best(BUILDERS[name](ObjectiveConfig(kind=name)))
    assert near(-loss, value)
    torch.testing.assert_close(DIVERGENCES[name].activation(score_V), best_T, atol=2e-6, rtol=0)


def test_total_variation_is_reached_by_the_sign():
    objective = BUILDERS["tv"](ObjectiveConfig(kind="tv"))
    assert near(-float(expected(objective, 50 * (P - Q).sign())), float(0.5 * (P - Q).abs().sum()))
    assert -best(objective)[1] <= float(0.5 * (P - Q).abs().sum()) + 1e-12


def test_conjugates_are_those_of_the_activations():
    """f*(t) = max_u (t u - f(u)), and f*'(f'(u)) = u: the slope of f*(g(v)) over that of g(v) is the ratio u."""
    v = torch.linspace(-2, 0.9, 30, dtype=torch.float64, requires_grad=True)
    for name, (activation, conjugate) in DIVERGENCES.items():
        slopes = [torch.autograd.grad(function(v).sum(), v)[0] for function in (conjugate, activation)]
        ratio, t = slopes[0] / slopes[1], activation(v)
        assert (slopes[1] > 0).all(), name  # real images have the higher scores
        if name != "tv":
            derivative = {
                "kl": ratio.log() + 1,
                "reverse-kl": -1 / ratio,
                "pearson": 2 * (ratio - 1),
                "neyman": 1 - ratio**-2,
                "hellinger": 1 - ratio**-0.5,
                "js": (2 * ratio / (1 + ratio)).log(),
                "gan": (ratio / (1 + ratio)).log(),
            }[name]
            torch.testing.assert_close(derivative, t, msg=name)


def test_the_game_is_one_of_the_divergences():
    scores = Scores(torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64))
    other = objective_of(ObjectiveConfig(kind="gan"))
    torch.testing.assert_close(minimax().critic(scores), other.critic(scores))
    torch.testing.assert_close(minimax().generator(scores), other.generator(scores))


def test_hinge_is_least_at_the_sign():
    assert near(float(expected(hinge(), (P - Q).sign())), 1.2)
    assert near(1.2, float(2 * torch.minimum(P, Q).sum()))
    for step in (-0.01, 0.01):
        for at in range(5):
            moved = (P - Q).sign()
            moved[at] += step
            assert expected(hinge(), moved) >= 1.2 - 1e-12


def test_energy_is_least_at_nought_and_the_margin():
    margin = 1.0
    score_V = torch.where(P > Q, 0.0, margin).double()
    assert near(float(expected(energy(margin), score_V)), margin * 0.6)
    assert near(0.6, float(torch.minimum(P, Q).sum()))
    for other in (0.3, 0.7):
        assert expected(energy(margin), torch.full((5,), other, dtype=torch.float64)) >= 0.6


def test_wasserstein_is_the_distance_over_critics_of_slope_one():
    """The linear program of the dual; the objective's value there is the distance."""
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    bounds = np.array([[(k == i) - (k == j) for k in range(5)] for i, j in pairs], float)
    limit = np.array([abs(float(PLACES[i] - PLACES[j])) for i, j in pairs])
    solved = linprog((Q - P).numpy(), A_ub=bounds, b_ub=limit, bounds=(None, None))
    assert near(-float(expected(wasserstein(), torch.tensor(solved.x))), 1.94)


def test_relativistic_is_worst_for_the_generator_where_both_are_the_same():
    assert best(relativistic())[1] == pytest.approx(0.4777, abs=1e-4)
    same = Scores(torch.ones(3), torch.ones(3))
    assert near(float(relativistic().critic(same)[0]), math.log(2))
    real, fake = torch.randn(7), torch.randn(7)
    exchanged = relativistic().critic(Scores(fake, real))
    torch.testing.assert_close(relativistic().generator(Scores(real, fake)), exchanged)


def test_loss_sensitive_keeps_the_distance_between_real_and_generated():
    objective = loss_sensitive(weight=2.0)
    loss_B = objective.critic(Scores(torch.tensor([1.0, 1.0]), torch.tensor([5.0, 2.0]), torch.tensor([3.0, 3.0])))
    assert loss_B.tolist() == [1.0, 1.0 + 2 * 2.0]  # the first has its margin
    assert objective.generator(Scores(torch.zeros(1), torch.tensor([4.0]))).tolist() == [4.0]
    assert objective.needs_gap


def test_the_balance_of_began_follows_the_ratio_within_its_bounds():
    objective = began(gamma=0.5, rate=0.1)
    assert objective.critic(Scores(torch.ones(1), torch.ones(1), balance=0.25)).tolist() == [0.75]
    assert objective.rebalanced is not None
    assert objective.rebalanced(0.5, 2.0, 0.5) == pytest.approx(0.5 + 0.1 * (0.5 * 2 - 0.5))
    assert objective.rebalanced(0.0, 0.0, 1.0) == 0.0
    assert objective.rebalanced(1.0, 9.0, 0.0) == 1.0


def test_began_reaches_its_equilibrium_on_two_numbers():
    """A critic that lowers its error of what it is shown, and a generator that follows: L(G) / L(x) goes to gamma."""
    gamma = 0.6
    objective, k = began(gamma, rate=0.02), 0.0
    real, fake = torch.tensor([1.0]), torch.tensor([2.0])
    for _ in range(3000):
        real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
        objective.critic(Scores(real, fake, balance=k)).sum().backward()
        assert real.grad is not None
        assert fake.grad is not None
        # an image that is hard to reproduce is harder the better it is; the generator's own step lowers its error
        real = (real - 0.01 * (real.grad - 0.5 / real.detach())).detach()
        fake = (fake - 0.01 * (fake.grad + 0.5 * fake.detach())).clamp(min=1e-3).detach()
        assert objective.rebalanced is not None
        k = objective.rebalanced(k, float(real), float(fake))
        assert 0 <= k <= 1
    assert float(fake / real) == pytest.approx(gamma, abs=0.05)


def test_every_name_of_the_configuration_is_built():
    assert set(BUILDERS) == set(OBJECTIVES)
    scores = Scores(torch.zeros(3), torch.zeros(3), torch.zeros(3))
    for name in OBJECTIVES:
        objective = objective_of(ObjectiveConfig(kind=name))
        assert objective.critic(scores).shape == objective.generator(scores).shape == (3,)


# Penalties -----------------------------------------------------------------------------------


def test_penalties_of_a_linear_critic_are_exact():
    w = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real, fake = torch.rand(4, 3, 2, 2, dtype=torch.float64), torch.rand(4, 3, 2, 2, dtype=torch.float64)
    rows, norm = torch.arange(4), w.norm()

    def critic(img: torch.Tensor) -> torch.Tensor:
        return img.flatten(1) @ w

    wanted = {
        "between": (norm - 1) ** 2,
        "around": (norm - 1) ** 2,
        "r1": norm**2 / 2,
        "r2": norm**2 / 2,
        "r1-r2": norm**2,
    }
    for kind, value in wanted.items():
        torch.testing.assert_close(
            penalty(kind, critic, real, fake, 0, 0, rows), value.expand(4), rtol=1e-12, atol=1e-12
        )


def test_the_gradient_of_a_penalty_is_that_of_torch_func():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    at = torch.rand(5, 3, 2, 2, dtype=torch.float64)
    weights = dict(net.named_parameters())

    def reference(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        def one(img: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(net, weights, (img[None],))[0, 0]

        return (torch.func.vmap(torch.func.grad(one))(at).flatten(1).norm(dim=1) - 1).square().sum()

    wanted = torch.func.grad(reference)({name: tensor.detach() for name, tensor in weights.items()})
    one_centred(lambda img: net(img)[:, 0], at).sum().backward()
    for name, parameter in weights.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, wanted[name], rtol=1e-10, atol=1e-12, msg=name)
    assert zero_centred(lambda img: 0 * net(img)[:, 0], at).tolist() == [0.0] * 5


def test_points_of_a_penalty_are_functions_of_seed_epoch_and_row():
    real, fake = torch.rand(6, 1, 4, 4), torch.rand(6, 1, 4, 4)
    rows, order = torch.arange(10, 16), torch.tensor([3, 0, 5, 1, 2, 4])
    for points in (
        lambda *at: between(real[at[2]], fake[at[2]], *at[:2], rows[at[2]]),
        lambda *at: around(real[at[2]], *at[:2], rows[at[2]]),
    ):
        everything = torch.arange(6)
        assert torch.equal(points(1, 2, order), points(1, 2, everything)[order])
        assert not torch.equal(points(1, 3, everything), points(1, 2, everything))
    share = (between(real, fake, 1, 2, rows) - fake) / (real - fake)
    torch.testing.assert_close(share.flatten(1).std(1), torch.zeros(6), atol=1e-4, rtol=0)
    assert (share > -1e-4).all()
    assert (share < 1 + 1e-4).all()
    moved = around(real, 1, 2, rows) - real
    assert (moved >= 0).all()
    assert (moved.flatten(1).amax(1) <= 0.5 * real.flatten(1).std(1)).all()


def test_wgan_gp_measures_the_distance_of_two_normals():
    """N(0, 1) and N(3, 1) in one dimension: the gap of the best critic of slope one is 3.

    The penalty leaves a slope a little above one: the gap is too large by 3^2 / (2 weight) at least, so that the usual
    weight of 10 would find 3.45. And it keeps the sign of the first slope, so that is positive here.
    """
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.abs_()
    adam = torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.5, 0.9))
    objective, gaps = wasserstein(), []
    for step in range(600):
        real, fake = 3 + torch.randn(128, 1), torch.randn(128, 1)
        at = between(real, fake, 0, step, torch.arange(128))
        scores = Scores(critic(real)[:, 0], critic(fake)[:, 0])
        loss_B = objective.critic(scores) + 100 * one_centred(lambda x: critic(x)[:, 0], at)
        adam.zero_grad()
        loss_B.mean().backward()
        adam.step()
        gaps.append(float((scores.real_B.mean() - scores.fake_B.mean()).detach()))
    assert sum(gaps[-200:]) / 200 == pytest.approx(3.0, abs=0.1)
    assert float(slope(lambda x: critic(x)[:, 0], torch.tensor([[1.5]])).detach()) == pytest.approx(1.0, abs=0.1)


# Terms ---------------------------------------------------------------------------------------


def test_pull_away_is_the_mean_squared_cosine_of_pairs_of_real_rows():
    features, weight = torch.randn(6, 4, dtype=torch.float64), torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=torch.float64)
    kept = nn.functional.normalize(features[weight > 0], dim=1)
    cosines = (kept @ kept.T).square()
    wanted = (cosines.sum() - cosines.diag().sum()) / 12
    torch.testing.assert_close(pull_away(features, weight), wanted)


def test_feature_matching_compares_means_of_real_rows():
    fake, real, weight = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([1.0, 0, 1, 1, 0])
    wanted = (real[weight > 0].mean(0) - fake[weight > 0].mean(0)).square().sum()
    torch.testing.assert_close(feature_matching(fake, real, weight), wanted)


def test_the_likeness_of_a_row_is_that_to_the_other_real_rows_of_all_workers():
    kernel, weight = torch.randn(6, 3, 2, dtype=torch.float64), torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=torch.float64)
    found = likeness(kernel, weight)
    for row in range(6):
        others = [other for other in range(6) if other != row and weight[other]]
        wanted = sum(torch.exp(-(kernel[row] - kernel[other]).abs().sum(1)) for other in others)
        torch.testing.assert_close(found[row], wanted)
    parts = on_ranks(2, lambda rank: likeness(kernel[3 * rank :][:3], weight[3 * rank :][:3]))
    torch.testing.assert_close(torch.cat(parts), found)
