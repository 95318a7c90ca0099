"""The cells of semi-discrete optimal transport are those of the exact assignment, on any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.placement import ranges
from glann.samplers.base import Codes
from glann.samplers.transport import Heights
from scipy.optimize import linear_sum_assignment

COUNT, POINTS = 50, 2000


def case():
    """Codes z_ND and points x_SD in a plane."""
    generator = torch.Generator().manual_seed(0)
    return 0.4 * torch.randn(COUNT, 2, generator=generator), torch.randn(POINTS, 2, generator=generator)


def cells(rank, world, height_N):
    """The cells of this worker's points, with this worker's codes."""
    z_ND, x_SD = case()
    rows, points = ranges(COUNT, world)[rank], ranges(POINTS, world)[rank]
    heights = Heights(COUNT, torch.device("cpu"))
    with torch.no_grad():
        heights.height_N.copy_(torch.from_numpy(height_N))
    own = Codes(z_ND[rows.start : rows.stop], rows, COUNT)
    return heights.cells(x_SD[points.start : points.stop], own).numpy()


@pytest.fixture(scope="module")
def exact():
    """Heights with POINTS / COUNT points in every cell, and the cells by the exact assignment."""
    z_ND, x_SD = case()
    heights, codes = Heights(COUNT, torch.device("cpu")), Codes(z_ND, range(COUNT), COUNT)
    for step in range(1000):
        before_N = heights.height_N.detach().clone()
        _, counted_N, _ = heights.step(x_SD, codes, 0.1 * 1e-5 ** (step / 1000), 0.5, torch.zeros(0))
        if bool((counted_N == POINTS // COUNT).all()):
            break
    cost_SN = (x_SD[:, None].double() - z_ND[None].double()).square().sum(2)
    column_S = linear_sum_assignment(np.repeat(cost_SN.numpy(), POINTS // COUNT, axis=1))[1]
    return before_N.numpy(), column_S // (POINTS // COUNT)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_workers_finds_the_cells_of_the_exact_assignment(local_ray, gloo_group, exact, world):
    height_N, cell_S = exact
    with gloo_group(world) as ranks:
        calls = [member.run.remote(cells, rank, world, height_N) for rank, member in enumerate(ranks)]
        assert np.array_equal(np.concatenate(local_ray.get(calls, timeout=120)), cell_S)
