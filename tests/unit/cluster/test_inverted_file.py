"""The approximate search: what it names is there, its recall is true, and looking into every cell is exact."""

import pytest
import torch
from glann.cluster.inverted_file import ivf_nearest
from glann.errors import UserError


def codes(rows: int, dim: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)


def brute(z_ND: torch.Tensor, c_MD: torch.Tensor) -> torch.Tensor:
    return (z_ND.double()[:, None] - c_MD.double()[None]).square().sum(2)


@pytest.mark.parametrize(("n", "m", "d", "cells"), [(301, 407, 5, 13), (7, 3, 1, 64), (50, 999, 64, None)])
def test_looking_into_every_cell_is_the_exact_search(n, m, d, cells):
    z_ND, c_MD = torch.randn(n, d), torch.randn(m, d)
    index_N, distance_N, recall = ivf_nearest(z_ND, c_MD, cells, probes=10_000)
    square_NM = brute(z_ND, c_MD)
    torch.testing.assert_close(distance_N, square_NM.amin(1), rtol=1e-6, atol=1e-6)
    assert (square_NM.gather(1, index_N[:, None])[:, 0] <= square_NM.amin(1) * (1 + 1e-5) + 1e-6).all()
    assert recall > 0.99


def test_few_probes_find_most_and_the_recall_is_the_true_one():
    z_ND, c_MD = codes(256, 8), codes(5003, 8)  # as many queries as the sample, so recall is over all of them
    index_N, distance_N, recall = ivf_nearest(z_ND, c_MD, 64, probes=6)
    square_NM = brute(z_ND, c_MD)
    torch.testing.assert_close(distance_N, square_NM.gather(1, index_N[:, None])[:, 0])
    true_recall = (square_NM.argmin(1) == index_N).double().mean()
    assert recall == pytest.approx(float(true_recall), abs=1e-6)
    assert 0.7 < recall < 1
    fewer = ivf_nearest(z_ND, c_MD, 64, probes=1)[2]
    assert fewer < recall


def test_nan_and_nothing_to_search_are_refused():
    with pytest.raises(UserError, match="NaN"):
        ivf_nearest(codes(5, 3), torch.full((4, 3), float("nan")), None, 4)
    with pytest.raises(UserError, match="no candidates"):
        ivf_nearest(codes(5, 3), torch.empty(0, 3), None, 4)
