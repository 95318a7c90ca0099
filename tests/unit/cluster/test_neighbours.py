"""Protects the certified search: its answer is brute force in float64, whatever the codes look like."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from glann.cluster import neighbours
from glann.cluster.neighbours import NearestSearch, nearest, ring_nearest, squared_distances
from glann.errors import UserError


def brute_force(z_ND, candidates_MD):
    """Index and squared distance by float64 brute force with exactly rounded sums; ties to the lowest index."""
    z, c = z_ND.double().numpy(), candidates_MD.double().numpy()
    exact = [[math.fsum((row - other) ** 2) for other in c] for row in z]
    return np.argmin(exact, axis=1), np.min(exact, axis=1)


def check(z_ND, candidates_MD, **how):
    index_N, distance_N = nearest(z_ND, candidates_MD, **how)
    expected_N, exact_N = brute_force(z_ND, candidates_MD)
    np.testing.assert_array_equal(index_N.numpy() - how.get("first_index", 0), expected_N)
    np.testing.assert_allclose(distance_N.numpy(), exact_N, rtol=1e-13, atol=0)


def on_sphere(n, d):
    return torch.nn.functional.normalize(torch.randn(n, d), dim=1)


@pytest.fixture(autouse=True)
def _seed(record_property):
    seed = torch.seed()
    record_property("seed", seed)
    print(f"seed {seed}")


@pytest.fixture(params=["cache-tiles", "tiny-tiles", "always-float64"])
def tiles(request, monkeypatch):
    """Also with tiles so small that every boundary is crossed, and with every close pair separated in float64."""
    if request.param == "always-float64":
        monkeypatch.setattr(neighbours, "_CROWD", -1)
    if request.param != "cache-tiles":
        monkeypatch.setattr(neighbours, "_CPU_TILE", (5, 7))
        monkeypatch.setattr(neighbours, "_GROUP", 3)
        monkeypatch.setattr(neighbours, "_EXACT_NUMBERS", 97)


@pytest.mark.parametrize("d", [1, 2, 64, 257])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (53, 117), (40, 13)])
def test_random_codes(n, m, d, tiles):
    check(torch.randn(n, d), torch.randn(m, d))
    check(on_sphere(n, d), on_sphere(m, d), first_index=1000)


@pytest.mark.parametrize("d", [1, 3, 64])
def test_codes_of_very_different_norms(d, tiles):
    z = on_sphere(60, d) * 10 ** (3 * torch.randn(60, 1))
    c = on_sphere(90, d) * 10 ** (3 * torch.randn(90, 1))
    check(z, c)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-10, 1e10, 1e30, 1e38])
def test_scales_from_subnormal_to_the_largest(scale, tiles):
    check((on_sphere(20, 9).double() * scale).float(), (on_sphere(30, 9).double() * scale).float())


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_codes_far_from_the_origin(offset, tiles):
    check(torch.randn(40, 16) + offset, torch.randn(80, 16) + offset)


def test_queries_far_from_the_candidates(tiles):
    check(torch.randn(40, 16) + 1e5, torch.randn(80, 16) - 1e5)


def test_ties_and_duplicates_go_to_the_lowest_index(tiles):
    c = torch.randint(-1, 2, (40, 3)).float()  # at most 27 different points
    z = torch.randint(-1, 2, (50, 3)).float() / 2
    check(z, c)
    d = on_sphere(6, 64)
    index_N, distance_N = nearest(d, d.repeat(5, 1))
    assert index_N.tolist() == list(range(6))
    assert not distance_N.any()


def test_ten_thousand_equal_candidates():
    z, c = torch.randn(300, 8), torch.randn(1, 8).repeat(10_000, 1)
    index_N, distance_N = nearest(z, c)
    assert not index_N.any()
    assert torch.equal(distance_N, squared_distances(z, c[:300]))


def test_candidates_closer_to_one_another_than_float32_resolves(tiles):
    """In the expanded form all of these look equally near; the certificate must notice."""
    centre, z = on_sphere(1, 64), on_sphere(25, 64)
    check(z, centre + 1e-7 * torch.randn(60, 64))
    check(centre + 1e-7 * torch.randn(30, 64), centre + 1e-7 * torch.randn(60, 64))


def test_queries_among_the_candidates_find_themselves():
    c = on_sphere(3000, 64)
    index_N, distance_N = nearest(c[700:900], c)
    assert index_N.tolist() == list(range(700, 900))
    assert not distance_N.any()


def test_the_certificate_holds_for_every_pair():
    """Lower and upper bounds of the fast pass really enclose the float64 distance."""
    for d in (1, 16, 257):
        z, c = torch.randn(50, d) * 10 ** torch.randn(50, 1), torch.randn(70, d) * 10 ** torch.randn(70, 1)
        search = NearestSearch(z)
        block = neighbours._Block(c, torch.arange(len(c)), 32, search)
        shifted = (z * block.scale - block.centre_D).double()
        square_N1 = shifted.square().sum(1, keepdim=True)
        query = torch.cat([-2 * shifted.float(), torch.ones(50, 1)], dim=1)
        lower = torch.cat([query @ tile for tile in block.tiles_EC], dim=1)
        upper = lower + torch.cat(block.lifts_C)
        true = torch.cdist(z.double(), c.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2 * block.scale**2
        slack = search.kappa * square_N1 + 1e-30
        assert (lower.double() <= true - square_N1 + slack).all()
        assert (upper.double() >= true - square_N1 - slack).all()


@pytest.fixture
def pairs(monkeypatch):
    """The numbers of pairs that are compared one by one in float64, as they come."""
    measured, exact = [], neighbours.squared_distances
    monkeypatch.setattr(neighbours, "squared_distances", lambda a, b: measured.append(len(a)) or exact(a, b))
    return measured


def test_few_pairs_are_measured_again_on_the_sphere(pairs):
    nearest(on_sphere(500, 64), on_sphere(40_000, 64))
    assert sum(pairs) < 500 * 12  # of 40,000 candidates each; the logarithm of the number of tiles


@pytest.mark.parametrize("distinct", [1, 20])
def test_few_pairs_are_measured_again_among_equal_candidates(distinct, pairs):
    """A mapping whose units have died makes the same candidate again and again."""
    z, c = on_sphere(301, 64), on_sphere(distinct, 64)[torch.randint(distinct, (9_001,))]
    check(z[:3], c)
    pairs.clear()
    nearest(z, c)
    assert sum(pairs) < 301 * 4  # of 9,001 candidates each


@pytest.mark.parametrize("spread", [1e-7, 1e-6, 1e-5])
def test_few_pairs_are_measured_again_among_candidates_that_lie_together(spread, pairs):
    """A mapping that collapses makes candidates that float32 cannot tell apart from a code's distance."""
    z, c = on_sphere(301, 64), on_sphere(1, 64) + spread * torch.randn(9_001, 64)
    check(z[:3], c)
    pairs.clear()
    nearest(z, c)
    assert sum(pairs) < 301 * (9 + 2) * 4  # about one a tile; of 9,001 candidates each


def test_products_in_float64_never_separate_the_nearest_pair():
    """Against sums that are rounded once, for candidates so close that the bound of float32 keeps them all."""
    for d in (1, 3, 64, 257):
        z, c = torch.randn(17, d) * 10 ** torch.randn(17, 1), torch.randn(1, d) + 1e-6 * torch.randn(83, d)
        search = NearestSearch(z)
        block = neighbours._Block(c, torch.arange(len(c)), 83, search)
        left = search._separated(torch.ones(17, 83, dtype=torch.bool), torch.arange(17), block, 0)
        expected_N, _ = brute_force(z, c)
        assert left[torch.arange(17), torch.from_numpy(expected_N)].all()
        measured = torch.stack([squared_distances(z, c[j : j + 1].expand(17, d)) for j in range(83)], dim=1)
        assert left[measured == measured.amin(1, keepdim=True)].all()
        if d > 1:  # on a line many are equal in float32
            assert left.sum() < 17 * 4


def test_the_order_and_size_of_blocks_do_not_matter():
    z, c = torch.randint(-2, 3, (80, 4)).float(), torch.randint(-2, 3, (200, 4)).float()
    whole = nearest(z, c)
    search = NearestSearch(z)
    for part in (range(150, 200), range(0, 1), range(1, 1), range(40, 150), range(1, 40)):
        search.add(c[part.start : part.stop], part.start)
    assert torch.equal(search.index_N, whole[0])
    assert torch.equal(search.distance_N, whole[1])


def test_distances_of_equal_pairs_are_equal_to_the_bit_in_any_company():
    a, b = torch.randn(500, 257), torch.randn(500, 257)
    whole = squared_distances(a, b)
    assert all(torch.equal(squared_distances(a[i : i + 1], b[i : i + 1])[0], whole[i]) for i in range(0, 500, 17))


def test_low_precision_settings_of_the_process_do_not_spoil_the_result():
    z, c = on_sphere(60, 64), on_sphere(90, 64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(z, c)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_queries_that_carry_a_graph_are_searched_without_one():
    z, c = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    assert not nearest(z, c)[1].requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value):
    good, bad = torch.randn(30, 4), torch.randn(30, 4)
    bad[7, 2] = value
    for search in (nearest, ring_nearest):
        with pytest.raises(UserError, match="1 of the queries"):
            search(bad, good)
        with pytest.raises(UserError, match="1 of the candidates"):
            search(good, bad)


def test_empty_and_unfitting_inputs():
    index_N, distance_N = nearest(torch.empty(0, 4), torch.randn(3, 4))
    assert index_N.shape == distance_N.shape == (0,)
    with pytest.raises(UserError, match="no candidates"):
        nearest(torch.randn(3, 4), torch.empty(0, 4))
    with pytest.raises(UserError, match="shapes"):
        nearest(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(UserError, match="float32"):
        nearest(torch.randn(3, 4).double(), torch.randn(3, 4).double())
