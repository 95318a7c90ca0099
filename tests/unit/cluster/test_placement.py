"""Protects the placement of rows: every row is visited exactly once an epoch, by one worker, reproducibly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from glann.cluster.placement import Share, epoch_plan, even_batch, global_batches, ranges, rows_left


def real_rows(plan) -> np.ndarray:
    return np.concatenate([batch.rows_B[batch.weight_B > 0] for batch in plan])


@pytest.mark.parametrize(("rows", "world"), [(10, 1), (10, 3), (11, 4), (3, 3), (2, 5), (1_000_003, 7)])
def test_ranges_are_contiguous_and_equal_to_within_one_row(rows, world):
    parts = ranges(rows, world)
    assert len(parts) == world
    assert parts[0].start == 0
    assert parts[-1].stop == rows
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def sizes(rows, world) -> list[int]:
    return [len(part) for part in ranges(rows, world)]


EVEN = [(100, 1, 10), (101, 2, 10), (103, 4, 7), (5, 5, 5), (64, 3, 64), (600, 3, 40), (257, 2, 128), (129, 4, 128)]


@pytest.mark.parametrize(
    ("rows", "world", "batch"), [*EVEN, (1, 1, 1), (1, 1, 128), (7, 2, 128), (9, 2, 8), (11, 3, 3)]
)
def test_an_epoch_is_dealt_in_batches_that_differ_by_one_row(rows, world, batch):
    """As many as are needed, for any number of workers, whose parts differ by a row, too; every row is visited once."""
    steps = -(-rows // batch)
    share = [Share(batch, rank, world) for rank in range(world)]
    left_W = sizes(rows, world)
    plans = [epoch_plan(3, 2, own, share[rank], left_W) for rank, own in enumerate(ranges(rows, world))]
    assert sorted(np.concatenate([real_rows(plan) for plan in plans])) == list(range(rows))
    together = np.array([[planned.weight_B.sum() for planned in plan] for plan in plans])
    assert together.shape == (world, steps)
    assert together.sum(0).tolist() == sizes(rows, steps)
    assert np.ptp(together, axis=0).max() <= 1
    assert {planned.rows_B.shape for plan in plans for planned in plan} == {(-(-batch // world),)}


def test_one_row_more_than_a_batch_makes_no_batch_of_one_row():
    """Under BatchNorm a lone row has no gradient, and its moments are not those of images."""
    for plan in (epoch_plan(0, 0, range(257), Share(128), [257]), global_batches(0, 0, 257, 128)):
        assert sorted(len(real_rows([part]) if hasattr(part, "weight_B") else part) for part in plan) == [85, 86, 86]


def test_no_batch_of_an_epoch_is_a_short_rest():
    random = np.random.default_rng(seed := int(np.random.default_rng().integers(2**32)))
    print("seed", seed)
    for _ in range(500):
        rows, batch, world = (int(random.integers(1, most)) for most in (400, 70, 10))
        world = min(world, rows)
        dealt_SW = Share(batch, 0, world).deal(np.array(sizes(rows, world)))
        assert len(dealt_SW) == -(-rows // batch)
        assert np.ptp(dealt_SW.sum(1)) <= 1
        assert np.ptp(dealt_SW, axis=1).max() <= 1
        assert (dealt_SW.sum(0) == sizes(rows, world)).all()
        assert dealt_SW.max() <= Share(even_batch(rows, batch), 0, world).size <= Share(batch, 0, world).size
        taken = int(random.integers(len(dealt_SW) + 1))
        rest_SW = Share(batch, 0, world).deal(dealt_SW[taken:].sum(0))
        np.testing.assert_array_equal(rest_SW, dealt_SW[taken:])  # what a resumed epoch continues with


@pytest.mark.parametrize(
    ("rows", "batch", "even"), [(257, 128, 86), (5000, 128, 125), (3, 128, 3), (1, 1, 1), (8, 4, 4)]
)
def test_the_largest_batch_of_an_epoch(rows, batch, even):
    assert even_batch(rows, batch) == even
    assert -(-rows // even) == -(-rows // batch)


def test_a_local_batch_cuts_into_equal_micro_batches():
    assert [Share(128, 0, world, 4).size for world in (1, 2, 3, 5)] == [128, 64, 44, 28]
    assert all(Share(128, rank, 3, 4).size == 44 for rank in range(3))


def test_padding_rows_can_be_read_by_the_worker_and_weigh_nothing():
    plan = epoch_plan(0, 0, range(20, 25), Share(4, 0, 1, 4), [5])
    assert all(batch.rows_B.shape == batch.weight_B.shape == (4,) for batch in plan)
    assert all(((batch.rows_B >= 20) & (batch.rows_B < 25)).all() for batch in plan)
    assert [float(batch.weight_B.sum()) for batch in plan] == [3, 2]
    assert plan[0].rows_B.dtype == np.int64
    assert plan[0].weight_B.dtype == np.float32


def test_the_plan_is_a_pure_function_and_differs_between_seeds_epochs_and_ranges():
    def order(seed=1, epoch=1, rows=range(50, 150)):
        return tuple(real_rows(epoch_plan(seed, epoch, rows, Share(10), [len(rows)])) - rows.start)

    assert order() == order()
    assert len({order(), order(seed=2), order(epoch=2), order(rows=range(51, 151))}) == 4


def test_the_order_is_the_same_on_every_machine():
    """The stream of numpy's raw Philox is fixed, so these numbers are."""
    assert real_rows(epoch_plan(0, 0, range(8), Share(8), [8])).tolist() == [6, 3, 7, 2, 4, 5, 0, 1]


def test_positions_of_a_row_are_uniform():
    rng = np.random.default_rng()
    seed = int(rng.integers(2**32))
    where = [np.argsort(real_rows(epoch_plan(seed, epoch, range(5), Share(5), [5]))) for epoch in range(2000)]
    counts = np.stack([np.bincount(column, minlength=5) for column in np.stack(where).T])
    assert np.abs(counts - 400).max() < 100, f"seed {seed}: {counts}"  # 5.6 standard deviations


@pytest.mark.parametrize("share", [Share(5), Share(10, 1, 2), Share(16, 2, 3), Share(16, 0, 3)])
def test_a_continued_epoch_is_the_rest_of_the_same_epoch(share):
    """Also in which rows and how many padding rows a batch has: a resumed run is the same bit for bit."""
    left_W = sizes(37 * share.world, share.world)
    whole = epoch_plan(7, 3, range(100, 137), share, left_W)
    visited = np.full(37, 3)
    for batch in whole[:3]:
        visited[batch.rows_B[batch.weight_B > 0] - 100] += 1
    left_W = left_W - share.deal(left_W)[:3].sum(0)
    assert left_W[share.rank] == rows_left(3, visited)
    rest = epoch_plan(7, 3, range(100, 137), share, left_W, visited, first_step=3)
    assert [batch.step for batch in rest] == list(range(3, len(whole)))
    for a, b in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(a.rows_B, b.rows_B)
        np.testing.assert_array_equal(a.weight_B, b.weight_B)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_begun_by_an_earlier_version_is_finished_evenly(world):
    """Glann 0.1 dealt whole batches and then a rest: some of those are behind its checkpoint of mid-epoch."""
    rows, batch = 257, 128
    for done in (1, 2):
        parts = ranges(rows, 2)  # the workers that wrote it
        visited = np.concatenate([(np.random.default_rng(rank).permutation(len(part)) * 2 + rank) < done * batch
                                  for rank, part in enumerate(parts)]).astype(np.int32)  # fmt: skip
        assert visited.sum() == done * batch
        own = [visited[part.start : part.stop] for part in ranges(rows, world)]
        left_W = [rows_left(0, visited_n) for visited_n in own]
        share = [Share(even_batch(rows, batch), rank, world) for rank in range(world)]
        plans = [
            epoch_plan(5, 0, part, share[rank], left_W, own[rank], done)
            for rank, part in enumerate(ranges(rows, world))
        ]
        assert {len(plan) for plan in plans} == {3 - done}  # the steps that the schedules of its epoch count on
        seen = np.concatenate([real_rows(plan) for plan in plans])
        assert sorted(seen) == np.flatnonzero(visited == 0).tolist()
        together = sum(np.array([planned.weight_B.sum() for planned in plan]) for plan in plans)
        assert np.ptp(together) <= 1


def test_no_row_is_lost_or_visited_twice_while_the_number_of_workers_changes_within_epochs():
    """Each start trains for some steps, with random changes of W at random steps, and the next continues."""
    seed = int(np.random.default_rng().integers(2**32))
    print("seed", seed)
    random = np.random.default_rng(seed)
    for _ in range(40):
        rows, epochs = int(random.integers(20, 200)), 3
        batch, accumulation = int(random.integers(8, 30)), int(random.integers(1, 3))
        visited, epoch, step, steps_taken = np.zeros(rows, np.int64), 0, 0, 0
        while epoch < epochs:
            world = int(random.integers(1, 5))
            parts = ranges(rows, world)
            shares = [Share(even_batch(rows, batch), rank, world, accumulation) for rank in range(world)]
            own = [visited[part.start : part.stop] for part in parts]
            left_W = [rows_left(epoch, mine) for mine in own]
            plans = [
                epoch_plan(seed, epoch, part, share, left_W, mine, step)
                for part, share, mine in zip(parts, shares, own, strict=True)
            ]
            (left,) = {len(plan) for plan in plans}
            taken = int(random.integers(1, left + 1)) if left else 0
            for plan in plans:
                for planned in plan[:taken]:
                    np.add.at(visited, planned.rows_B[planned.weight_B > 0], 1)
            real_S = np.sum([[planned.weight_B.sum() for planned in plan] for plan in plans], axis=0)
            lone = sum(left_W) == 1 or shares[0].size < 3  # a batch of one row cannot always be avoided
            assert real_S.min() >= (1 if lone else 2), (left_W, batch, real_S)
            step, steps_taken = step + taken, steps_taken + taken
            if taken == left:
                assert (visited == epoch + 1).all()
                epoch, step = epoch + 1, 0
        assert steps_taken <= epochs * (-(-rows // batch) + 8)  # uneven rests cost a few short steps at most


def test_a_worker_without_rows_or_with_other_rows_than_the_others_know_is_refused():
    with pytest.raises(ValueError, match="more workers than rows"):
        epoch_plan(0, 0, range(3, 3), Share(2), [0])
    with pytest.raises(ValueError, match="has 10 rows left"):
        epoch_plan(0, 0, range(10), Share(3), [9])
    with pytest.raises(ValueError, match="worker 0 of 2"):
        epoch_plan(0, 0, range(10), Share(3, 0, 2), [10])


@pytest.mark.parametrize(("rows", "batch"), [(100, 10), (103, 10), (3, 128), (129, 128), (1, 1)])
def test_global_batches_are_a_permutation_cut_evenly_in_order(rows, batch):
    batches = global_batches(4, 1, rows, batch)
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert [len(part) for part in batches] == sizes(rows, -(-rows // batch))
    if rows > 3:
        assert not np.array_equal(np.concatenate(batches), np.concatenate(global_batches(4, 2, rows, batch)))
