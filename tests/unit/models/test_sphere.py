"""Protects the projection of codes: the nearest point of the sphere or ball, at any norm, and today's bits."""

from __future__ import annotations

import pytest
import torch
from glann.models.sphere import project, project_rows


def test_the_ball_leaves_codes_inside_it_alone():
    inside = torch.tensor([[0.3, 0.4], [0.0, 0.0], [3.0, 4.0], [3e30, 4e30]])
    expected = torch.tensor([[0.3, 0.4], [0.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    torch.testing.assert_close(project_rows(inside, "ball", torch.ones(4, 2)), expected)
    torch.testing.assert_close(project(inside[:3], "ball"), expected[:3])


def test_a_code_that_has_no_projection_stays_where_it_was():
    z = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [0.0, 2.0]])
    before = torch.tensor([[1.0, 0.0]] * 4)
    expected = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert torch.equal(project_rows(z, "sphere", before), expected)


@pytest.mark.parametrize("constraint", ["sphere", "ball"])
def test_both_ways_are_the_nearest_point_of_a_float64_computation(constraint):
    z_BD = torch.randn(33, 7) * torch.logspace(-3, 3, 33)[:, None]
    norm_B1 = z_BD.double().norm(dim=1, keepdim=True)
    expected = z_BD.double() / (norm_B1 if constraint == "sphere" else norm_B1.clamp(min=1))
    for found in (project(z_BD, constraint), project_rows(z_BD, constraint, torch.zeros_like(z_BD))):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("constraint", ["sphere", "ball"])
def test_the_way_of_networks_has_the_gradient_of_finite_differences(constraint):
    z_BD = (torch.randn(5, 3, dtype=torch.float64) + 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: project(z, constraint), (z_BD,))
    zero = torch.zeros(2, 3, requires_grad=True)
    project(zero, constraint).sum().backward()
    assert zero.grad.isfinite().all()


def test_both_ways_keep_their_bits():
    """Packaged models draw the same bytes, and resumed runs go the same way, under any later version."""
    z_BD = torch.tensor([[0.3, -1.7, 2.9], [1e-3, 0.7, -0.1], [5.5, 4.4, -3.3]])
    assert torch.equal(project(z_BD, "sphere"), torch.nn.functional.normalize(z_BD, dim=1))
    assert torch.equal(project(z_BD, "ball"), z_BD / z_BD.norm(dim=1, keepdim=True).clamp(min=1.0))
    assert torch.equal(project_rows(z_BD, "sphere", z_BD), (z_BD / z_BD.double().norm(dim=1, keepdim=True)).float())


def test_codes_of_an_encoder_lie_anywhere():
    z_BD = torch.tensor([[3.0, 4.0], [0.0, 0.0], [float("nan"), 1.0]])
    assert torch.equal(project(z_BD[:2], "none"), z_BD[:2])
    assert torch.equal(project_rows(z_BD, "none", torch.ones(3, 2)), torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]]))
