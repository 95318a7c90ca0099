"""Protects the measures of codes against closed forms: angles, effective dimension, and agreement with images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from glann.models.organisation import NEIGHBOURS, agreement, effective_dimension, nearest_images, small_images, turned


def test_angles_are_exact_from_a_hundred_thousandth_of_a_degree_to_the_opposite():
    first_KD = torch.eye(5, 3)[:1].expand(5, 3).double()
    degrees = torch.tensor([0.0, 1e-5, 30.0, 90.0, 180.0], dtype=torch.float64)
    radians = degrees.deg2rad()
    z_KD = torch.stack([radians.cos(), radians.sin(), torch.zeros(5)], 1)
    torch.testing.assert_close(turned(z_KD, first_KD), degrees, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(turned(3 * z_KD, 0.01 * first_KD), degrees, rtol=1e-6, atol=1e-5)  # directions count


def test_the_effective_dimension_counts_equal_axes_and_ignores_the_mean():
    signs = torch.tensor(np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1).T)  # 16 corners: equal variances
    assert effective_dimension(signs + 7) == pytest.approx(4)
    assert effective_dimension(signs * torch.tensor([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_dimension(signs * torch.tensor([2.0, 1.0, 0.0, 0.0])) == pytest.approx(25 / 17)
    assert effective_dimension(torch.ones(5, 3)) == 0.0


def test_a_sample_of_an_even_cloud_has_the_documented_dimension():
    z_KD = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    assert effective_dimension(z_KD) == pytest.approx(2048 * 64 / (2048 + 64), rel=0.01)


def test_agreement_is_one_for_codes_that_follow_the_images_and_chance_for_random_ones():
    generator = torch.Generator().manual_seed(1)
    img = torch.rand(600, 3, 28, 28, generator=generator)
    x_KF = small_images(img)
    near_Kn = nearest_images(x_KF)
    assert near_Kn.shape == (600, NEIGHBOURS)
    assert not (near_Kn == torch.arange(600)[:, None]).any()
    rotation = torch.linalg.qr(torch.randn(768, 768, generator=generator))[0]
    assert agreement(x_KF @ rotation, near_Kn) == 1.0
    chance, spread = NEIGHBOURS / 599, math.sqrt(NEIGHBOURS / 599 / 600)
    assert agreement(torch.randn(600, 32, generator=generator), near_Kn) == pytest.approx(chance, abs=5 * spread)


@pytest.mark.parametrize("side", [8, 28, 1024])
def test_images_of_any_size_are_compared_at_most_at_16_pixels(side):
    small = small_images(torch.full((2, 1, side, side), 7, dtype=torch.uint8))
    assert small.shape == (2, min(side, 16) ** 2)
    torch.testing.assert_close(small, torch.full_like(small, 7.0))
