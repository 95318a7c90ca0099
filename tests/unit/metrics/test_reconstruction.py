"""Reconstruction error: known values, and sums that can be split over workers."""

import numpy as np
import pytest
import torch
from glann.errors import UserError
from glann.metrics.reconstruction import PSNR_LIMIT, l1, psnr
from glann.metrics.tally import Mean


def of(value_B):
    return Mean().update(value_B, torch.arange(len(value_B)))


def test_a_constant_difference_has_the_textbook_values():
    real = torch.full((2, 3, 5, 7), 100, dtype=torch.uint8)
    fake = real.clone()
    fake[1] += 51  # a fifth of the range
    assert l1(fake, real).tolist() == pytest.approx([0.0, 0.2])
    assert psnr(fake, real)[1].item() == pytest.approx(20 * np.log10(5))
    assert psnr(fake, real)[0].item() == PSNR_LIMIT


def test_darker_and_lighter_count_alike():
    """uint8 arithmetic would wrap around."""
    dark, light = torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    assert l1(dark, light).item() == l1(light, dark).item() == 1.0


def test_workers_with_uneven_shares_add_up():
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    real = torch.randint(0, 256, (11, 1, 6, 6), dtype=torch.uint8, generator=generator)
    fake = torch.randint(0, 256, (11, 1, 6, 6), dtype=torch.uint8, generator=generator)
    for metric in (l1, psnr):
        whole = of(metric(fake, real))
        parts = of(metric(fake[:3], real[:3])).merge(of(metric(fake[3:], real[3:])))
        assert parts.count == whole.count == 11
        assert parts.value() == pytest.approx(whole.value())
    expected = (fake.double() - real.double()).abs().mean().item() / 255
    assert of(l1(fake, real)).value() == pytest.approx(expected)


def test_what_cannot_be_compared_is_refused():
    image = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match="cannot be compared"):
        l1(image, image[:, :, :2])
    with pytest.raises(UserError, match="uint8"):
        psnr(image, image.float())
    with pytest.raises(UserError, match="no images"):
        Mean().value()
