"""Classes, conditions and codes: what a critic learns of them is what the papers say, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from glann.config.networks import CriticConfig
from glann.config.samplers import PriorConfig
from glann.models.critics import build_critic
from glann.models.labels import class_loss, information, one_hot, with_category, with_maps
from glann.samplers.base import build_network


def test_a_label_is_a_channel_and_the_end_of_a_code_and_an_unknown_one_is_nothing():
    label_B = torch.tensor([2, 0, -1])
    maps = with_maps(torch.rand(3, 1, 4, 4), label_B, 3)[:, 1:]
    assert torch.equal(maps.flatten(2).unique(dim=2)[:, :, 0], torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 0]]))
    code = with_category(torch.full((3, 5), 7.0), label_B, 3)
    assert code.tolist() == [[7, 7, 0, 0, 1], [7, 7, 1, 0, 0], [7, 7, 0, 0, 0]]


def test_the_loss_of_classes_is_that_of_known_rows_only():
    logit_BK = torch.randn(4, 3, dtype=torch.float64)
    label_B = torch.tensor([1, -1, 0, 2])
    loss_B = class_loss(logit_BK, label_B)
    assert loss_B[1] == 0
    for row in (0, 2, 3):
        assert float(loss_B[row]) == pytest.approx(-float(logit_BK[row].log_softmax(0)[label_B[row]]))


def test_the_score_of_classes_is_the_logit_of_an_image_that_is_not_generated():
    """With class K + 1 at logit 0: sigmoid(score) is the sum of the other classes' probabilities."""
    critic = build_critic(CriticConfig(width=4, classes=3), 28, 1)
    judged = critic(torch.rand(5, 1, 28, 28))
    all_BK1 = torch.cat([judged.head_BQ, torch.zeros(5, 1)], 1).softmax(1)
    torch.testing.assert_close(judged.score_B.sigmoid(), all_BK1[:, :3].sum(1))


def test_the_information_of_a_head_that_knows_the_code_is_its_entropy():
    """A category of ten: log 10 where the head is sure and right; a head that knows nothing has none."""
    code_BD = torch.cat([torch.zeros(10, 2), torch.eye(10)], 1)
    sure = information(40 * torch.eye(10), code_BD, 10, 0)
    torch.testing.assert_close(sure, torch.full((10,), math.log(10)))
    torch.testing.assert_close(information(torch.zeros(10, 10), code_BD, 10, 0), torch.zeros(10))
    exact = information(code_BD[:, :2], code_BD, 0, 2)
    apart = information(code_BD[:, :2] + 1, code_BD, 0, 2)
    torch.testing.assert_close(exact - apart, torch.ones(10))  # 1/2 for each number


def test_infogan_learns_to_show_its_category():
    """The bound rises to log 10 on a toy: a linear image of the code, with noise, and a linear head."""
    torch.manual_seed(0)
    prior = build_network(PriorConfig(shape="uniform", categories=10), 12, "sphere")
    image, head = torch.nn.Linear(12, 8), torch.nn.Linear(8, 10)
    adam = torch.optim.Adam([*image.parameters(), *head.parameters()], lr=0.03)
    bounds = []
    for _ in range(400):
        code_BD = prior(torch.randn(128, prior.noise_dim))
        bound_B = information(head(image(code_BD) + 0.1 * torch.randn(128, 8)), code_BD, 10, 0)
        adam.zero_grad()
        (-bound_B.mean()).backward()
        adam.step()
        bounds.append(float(bound_B.mean().detach()))
    assert bounds[0] < 0.5
    assert sum(bounds[-50:]) / 50 == pytest.approx(math.log(10), abs=0.02)
    assert max(bounds) <= math.log(10) + 1e-4


def test_categories_of_a_prior_are_drawn_alike_and_stand_at_the_end():
    prior = build_network(PriorConfig(shape="uniform", categories=4), 6, "sphere")
    assert prior.noise_dim == 3
    code_BD = prior(torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)))
    assert code_BD.shape == (4000, 6)
    assert (code_BD[:, :2].abs() < 1).all()
    hot_BK = code_BD[:, 2:]
    assert torch.equal(hot_BK, one_hot(hot_BK.argmax(1), 4))
    assert torch.allclose(hot_BK.mean(0), torch.full((4,), 0.25), atol=0.03)
