"""Protects the ring: every worker gets what one process with all candidates would get, and none hangs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from glann.cluster.inverted_file import ivf_nearest
from glann.cluster.neighbours import nearest, ring_nearest
from glann.errors import UserError


def search(z_nD, block_mD):
    try:
        index_n, distance_n = ring_nearest(torch.tensor(z_nD), torch.tensor(block_mD))
        return index_n.numpy(), distance_n.numpy()
    except UserError as error:
        return str(error)


def search_in_pair(z_nD, block_mD):
    """As `search`, among ranks 1 and 2 only."""
    pair = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    index_n, distance_n = ring_nearest(torch.tensor(z_nD), torch.tensor(block_mD), pair)
    return index_n.numpy(), distance_n.numpy()


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, gloo_group):
    with gloo_group(request.param) as members:
        yield members


def split(x, sizes):
    return [part.numpy() for part in x.split(sizes)]


def uneven(total, parts):
    """Sizes that differ, the last ones empty where there is little to share."""
    sizes = []
    for part in range(parts):
        sizes.append(min(total, 2 * (total + part) // (parts + 1) if part < parts - 1 else total))
        total -= sizes[-1]
    return sizes


def ring(local_ray, ranks, z_parts, c_parts, function=search):
    calls = [rank.run.remote(function, z, c) for rank, z, c in zip(ranks, z_parts, c_parts, strict=True)]
    return local_ray.get(calls, timeout=120)


def check(local_ray, ranks, z_ND, c_MD, z_sizes=None, c_sizes=None):
    world = len(ranks)
    answers = ring(
        local_ray,
        ranks,
        split(z_ND, z_sizes or uneven(len(z_ND), world)),
        split(c_MD, c_sizes or uneven(len(c_MD), world)),
    )
    index_N, distance_N = nearest(z_ND, c_MD)
    assert torch.equal(torch.cat([torch.tensor(index) for index, _ in answers]), index_N)
    assert torch.equal(torch.cat([torch.tensor(distance) for _, distance in answers]), distance_N)


@pytest.mark.parametrize("d", [1, 64, 257])
@pytest.mark.parametrize(("n", "m"), [(101, 307), (50, 7), (1, 2)])
def test_any_number_of_workers_finds_the_same_neighbours(local_ray, ranks, n, m, d):
    seed = torch.seed()
    print(f"seed {seed}")
    check(local_ray, ranks, torch.randn(n, d), torch.randn(m, d) * 10 ** torch.randn(m, 1))


def test_ties_between_workers_go_to_the_lowest_index(local_ray, ranks):
    z, c = torch.randint(-1, 2, (70, 3)).float() / 2, torch.randint(-1, 2, (90, 3)).float()
    check(local_ray, ranks, z, c)
    check(local_ray, ranks, z, c[:1].repeat(33, 1))


def test_workers_without_queries_or_candidates_take_part(local_ray, ranks):
    world = len(ranks)
    z, c = torch.randn(20, 5), torch.randn(30, 5)
    for owner in range(world):
        alone = [30 if rank == owner else 0 for rank in range(world)]
        check(local_ray, ranks, z, c, [20 if rank == world - 1 else 0 for rank in range(world)], alone)


def test_what_one_worker_may_not_use_is_refused_by_all_without_a_hang(local_ray, ranks):
    world = len(ranks)
    good, bad = torch.randn(6, 5).numpy(), torch.randn(6, 5)
    bad[3, 1] = math.nan
    parts = [good] * (world - 1) + [bad.numpy()]
    for answers in (ring(local_ray, ranks, parts, [good] * world), ring(local_ray, ranks, [good] * world, parts)):
        assert len(set(answers)) == 1
        assert "NaN" in answers[0]
    empty = [torch.empty(0, 5).numpy()] * world
    assert all("no candidates" in answer for answer in ring(local_ray, ranks, [good] * world, empty))
    check(local_ray, ranks, torch.randn(9, 5), torch.randn(9, 5))  # the group is still in step


@pytest.mark.parametrize("ranks", [3], indirect=True)
def test_a_part_of_the_workers_can_search_among_themselves(local_ray, ranks):
    z, c = torch.randn(3 * 8, 4), torch.randn(3 * 11, 4)
    answers = ring(local_ray, ranks, split(z, 8), split(c, 11), search_in_pair)
    index_N, distance_N = nearest(z[8:], c[11:])
    assert answers[0] is None
    assert torch.equal(torch.cat([torch.tensor(index) for index, _ in answers[1:]]), index_N)
    assert torch.equal(torch.cat([torch.tensor(distance) for _, distance in answers[1:]]), distance_N)


def search_in_cells(z_nD, block_mD):
    index_n, distance_n, recall = ivf_nearest(torch.tensor(z_nD), torch.tensor(block_mD), 12, 3)
    return index_n.numpy(), distance_n.numpy(), recall


def test_the_approximate_search_says_the_same_recall_on_every_worker_and_names_true_candidates(local_ray, ranks):
    torch.manual_seed(int(torch.randint(2**31, ())))
    z_ND, c_MD = torch.randn(301, 6), torch.randn(1009, 6)
    answers = ring(
        local_ray, ranks, split(z_ND, uneven(301, len(ranks))), split(c_MD, uneven(1009, len(ranks))), search_in_cells
    )
    index_N = torch.cat([torch.tensor(index) for index, _, _ in answers])
    distance_N = torch.cat([torch.tensor(distance) for _, distance, _ in answers])
    torch.testing.assert_close(distance_N, (z_ND.double() - c_MD[index_N].double()).square().sum(1))
    exact_N, _ = nearest(z_ND, c_MD)
    assert (exact_N == index_N).double().mean() > 0.5
    assert len({recall for _, _, recall in answers}) == 1


@pytest.mark.parametrize("distinct", [1, 3, 1009])
def test_the_approximate_search_matches_every_query_on_every_worker(local_ray, ranks, distinct):
    """Also if candidates coincide within and between workers, or a worker has none, or none of one cell."""
    seed = torch.seed()
    print(f"seed {seed}")
    few_KD = torch.randn(5, 6)[torch.randint(5, (distinct,))] + 1e-3 * torch.randn(distinct, 6)
    z_ND, c_MD = torch.randn(301, 6), few_KD[torch.randint(distinct, (1009,))]
    world = len(ranks)
    for sizes in (uneven(1009, world), [1009 if rank == world - 1 else 0 for rank in range(world)]):
        answers = ring(local_ray, ranks, split(z_ND, uneven(301, world)), split(c_MD, sizes), search_in_cells)
        index_N = torch.cat([torch.tensor(index) for index, _, _ in answers])
        distance_N = torch.cat([torch.tensor(distance) for _, distance, _ in answers])
        assert ((index_N >= 0) & (index_N < 1009)).all()
        true_N = (z_ND.double() - c_MD[index_N].double()).square().sum(1)
        torch.testing.assert_close(distance_N, true_N, rtol=1e-12, atol=0)
        assert len({recall for _, _, recall in answers}) == 1
        if distinct == 1:
            assert not index_N.any()
