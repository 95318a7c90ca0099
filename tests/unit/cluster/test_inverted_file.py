"""The approximate search: what it names is there, its recall is true, and looking into every cell is exact."""

import pytest
import torch
from glann.cluster.inverted_file import SAMPLE, ivf_nearest, sample_rows
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


def check_every_query_is_matched(z_ND, c_MD, cells, probes):
    """Each index names a candidate, and each distance is the true one to it, by float64."""
    index_N, distance_N, recall = ivf_nearest(z_ND, c_MD, cells, probes)
    assert ((index_N >= 0) & (index_N < len(c_MD))).all()
    true_N = (z_ND.double() - c_MD[index_N].double()).square().sum(1)
    torch.testing.assert_close(distance_N, true_N, rtol=1e-12, atol=0)
    square_NM = brute(z_ND, c_MD)
    assert (distance_N >= square_NM.amin(1) * (1 - 1e-12)).all()
    sample = sample_rows(len(z_ND), torch.device("cpu"))
    found = distance_N[sample] <= square_NM.amin(1)[sample] * (1 + 1e-12)
    assert recall == pytest.approx(float(found.double().mean()), abs=1e-6)
    return index_N


@pytest.mark.parametrize("distinct", [1, 3, 20])
@pytest.mark.parametrize("probes", [1, 16])
def test_every_query_is_matched_where_candidates_coincide(distinct, probes):
    c_MD = codes(distinct, 8)[torch.randint(distinct, (1003,))]
    index_N = check_every_query_is_matched(codes(501, 8), c_MD, None, probes)
    first_of_its_kind = (c_MD[:, None] == c_MD[None]).all(2).int().argmax(1)
    assert torch.equal(index_N, first_of_its_kind[index_N])  # the exact search's rule for ties


def test_every_query_is_matched_where_all_but_a_few_candidates_coincide():
    """As a mapping that is dying makes them: nearly all cells lose their candidates."""
    c_MD = torch.cat([codes(1, 8).repeat(990, 1), codes(17, 8)])[torch.randperm(1007)]
    for probes in (1, 2, 16):
        check_every_query_is_matched(codes(303, 8), c_MD, None, probes)


@pytest.mark.parametrize("kind", ["even", "clumps", "far apart"])
def test_every_query_is_matched_when_one_cell_is_searched(kind):
    """K-means leaves cells empty, most often where candidates lie close together."""
    start = int(torch.randint(2**31, ()))
    print("seeds from", start)
    for seed in range(start, start + 200):
        torch.manual_seed(seed)
        m = int(torch.randint(1, 160, ()))
        c_MD = torch.randn(m, 2)
        if kind == "clumps":
            c_MD = torch.randn(5, 2)[torch.randint(5, (m,))] + 1e-3 * c_MD * torch.rand(m, 1) ** 8
        elif kind == "far apart":
            c_MD = c_MD**9
        check_every_query_is_matched(torch.randn(37, 2), c_MD, None, 1)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e15, 1e30, 1e38])
def test_every_query_is_matched_at_any_scale_of_float32(scale):
    z_ND, c_MD = ((codes(rows, 7).double() * scale).float() for rows in (103, 207))
    check_every_query_is_matched(z_ND, c_MD, 11, 2)


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 2**24 + 4, 33_554_436, 50_000_004, 100_000_000, 2**31 + 11])
def test_recall_is_measured_on_rows_that_exist(rows):
    sample = sample_rows(rows, torch.device("cpu"))
    wanted = min(rows, SAMPLE)
    expected = [at * (rows - 1) // max(wanted - 1, 1) for at in range(wanted)]  # Python's integers
    assert sample.tolist() == expected
    assert (expected[0], expected[-1], len(set(expected))) == (0, rows - 1, wanted)


def test_more_rows_than_float32_can_count():
    """The last row of 2**24 + 4 is rounded past the end in float32."""
    z_N1, c_M1 = torch.randn(2**24 + 4, 1), torch.randn(64, 1)
    index_N, distance_N, recall = ivf_nearest(z_N1, c_M1, 4, 1)
    assert ((index_N >= 0) & (index_N < 64)).all()
    torch.testing.assert_close(distance_N, (z_N1.double() - c_M1[index_N].double()).square().sum(1))
    exact_N = torch.cat([brute(part, c_M1).amin(1) for part in z_N1[-1000:].split(100)])
    assert (distance_N[-1000:] == exact_N).double().mean() > 0.5
    assert 0.5 < recall <= 1
