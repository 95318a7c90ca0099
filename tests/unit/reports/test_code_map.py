"""The map of codes: the principal axes of those of images, and nothing of a damaged summary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.reports.code_map import code_chart, code_map, every, taken


def test_axes_are_those_of_the_singular_value_decomposition():
    torch.manual_seed(0)
    images, drawn = torch.randn(37, 5) * torch.tensor([4.0, 0.1, 2.0, 0.2, 0.3]) + 7, torch.randn(11, 5)
    found = code_map(images, drawn)
    centred = images.double() - images.double().mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    shares = values.square() / values.square().sum()
    np.testing.assert_allclose(found["explained"], shares[:2], atol=1e-4)
    expected = (drawn.double() - images.double().mean(0)) @ axes[:2].T
    np.testing.assert_allclose(np.abs(found["drawn"]), expected.abs(), atol=1e-3)
    assert len(found["images"]) == 37


def test_the_rows_that_are_shown_do_not_depend_on_blocks():
    z_ND = torch.arange(1700.0)[:, None]
    whole = taken(z_ND, 0, 1700)
    assert every(1700) == 3
    blocks = [taken(block, first, 1700) for first, block in zip((0, 700, 1400), z_ND.split(700), strict=True)]
    assert torch.equal(torch.cat(blocks), whole)
    assert whole[:3, 0].tolist() == [0, 3, 6]


def test_the_chart_says_how_much_the_axes_hold():
    drawn = code_chart({"code_map": code_map(torch.randn(20, 3), torch.randn(20, 3))})
    assert drawn is not None
    assert "new images" in drawn[0]
    assert "of their spread" in drawn[1]


@pytest.mark.parametrize(
    "held",
    [
        None,
        [],
        {"images": [], "drawn": [[1, 2]], "explained": [0.5]},
        {"images": [[1, 2]], "drawn": [["a", 2], [1], [float("nan"), 1]], "explained": [0.5]},
        {"images": [[1, 2]], "drawn": [[1, 2]], "explained": "x"},
        {"images": 3, "drawn": {}, "explained": [0.5]},
    ],
)
def test_a_summary_without_a_map_that_can_be_drawn_has_none(held):
    assert code_chart({"code_map": held}) is None
