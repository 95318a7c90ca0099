"""Protects the placement of rows: every row is visited exactly once an epoch, by one worker, reproducibly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from glann.cluster.placement import Share, epoch_plan, global_batches, ranges, steps_left


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


@pytest.mark.parametrize(
    ("rows", "world", "batch"), [(100, 1, 10), (101, 2, 10), (103, 4, 7), (5, 5, 5), (64, 3, 64), (600, 3, 40)]
)
def test_a_global_batch_is_the_same_for_any_number_of_workers(rows, world, batch):
    """Its size, the steps of an epoch, and that every row is visited once; workers differ by one row at most."""
    steps = -(-rows // batch)
    plans = [epoch_plan(3, 2, own, Share(batch, rank, world), steps) for rank, own in enumerate(ranges(rows, world))]
    assert sorted(np.concatenate([real_rows(plan) for plan in plans])) == list(range(rows))
    together = np.array([[planned.weight_B.sum() for planned in plan] for plan in plans])
    assert together.sum(0).tolist() == [batch] * (steps - 1) + [rows - batch * (steps - 1)]
    assert np.ptp(together, axis=0).max() <= 1
    assert {planned.rows_B.shape for plan in plans for planned in plan} == {(-(-batch // world),)}


def test_a_local_batch_cuts_into_equal_micro_batches():
    assert [Share(128, 0, world, 4).size for world in (1, 2, 3, 5)] == [128, 64, 44, 28]
    assert all(Share(128, rank, 3, 4).size == 44 for rank in range(3))


def test_padding_rows_can_be_read_by_the_worker_and_weigh_nothing():
    plan = epoch_plan(0, 0, range(20, 25), Share(4), 3)
    assert all(batch.rows_B.shape == batch.weight_B.shape == (4,) for batch in plan)
    assert all(((batch.rows_B >= 20) & (batch.rows_B < 25)).all() for batch in plan)
    assert [float(batch.weight_B.sum()) for batch in plan] == [4, 1, 0]
    assert plan[0].rows_B.dtype == np.int64
    assert plan[0].weight_B.dtype == np.float32


def test_the_plan_is_a_pure_function_and_differs_between_seeds_epochs_and_ranges():
    def order(seed=1, epoch=1, rows=range(50, 150)):
        return tuple(real_rows(epoch_plan(seed, epoch, rows, Share(10), 11)) - rows.start)

    assert order() == order()
    assert len({order(), order(seed=2), order(epoch=2), order(rows=range(51, 151))}) == 4


def test_the_order_is_the_same_on_every_machine():
    """The stream of numpy's raw Philox is fixed, so these numbers are."""
    assert real_rows(epoch_plan(0, 0, range(8), Share(8), 1)).tolist() == [6, 3, 7, 2, 4, 5, 0, 1]


def test_positions_of_a_row_are_uniform():
    rng = np.random.default_rng()
    seed = int(rng.integers(2**32))
    where = [np.argsort(real_rows(epoch_plan(seed, epoch, range(5), Share(5), 1))) for epoch in range(2000)]
    counts = np.stack([np.bincount(column, minlength=5) for column in np.stack(where).T])
    assert np.abs(counts - 400).max() < 100, f"seed {seed}: {counts}"  # 5.6 standard deviations


@pytest.mark.parametrize("share", [Share(5), Share(10, 1, 2), Share(16, 2, 3), Share(16, 0, 3)])
def test_a_continued_epoch_is_the_rest_of_the_same_epoch(share):
    steps = steps_left(3, share, np.full(37, 3))
    whole = epoch_plan(7, 3, range(100, 137), share, steps)
    visited = np.full(37, 3)
    for batch in whole[:3]:
        visited[batch.rows_B[batch.weight_B > 0] - 100] += 1
    rest = epoch_plan(7, 3, range(100, 137), share, steps_left(3, share, visited, 3), visited, first_step=3)
    assert [batch.step for batch in rest] == list(range(3, steps))
    for a, b in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(a.rows_B, b.rows_B)
        np.testing.assert_array_equal(a.weight_B, b.weight_B)


def test_no_row_is_lost_or_visited_twice_while_the_number_of_workers_changes_within_epochs():
    """Each start trains for some steps, with random changes of W at random steps, and the next goes on."""
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
            shares = [Share(batch, rank, world, accumulation) for rank in range(world)]
            own = [visited[part.start : part.stop] for part in parts]
            left = max(steps_left(epoch, share, mine, step) for share, mine in zip(shares, own, strict=True))
            plans = [
                epoch_plan(seed, epoch, part, share, left, mine, step)
                for part, share, mine in zip(parts, shares, own, strict=True)
            ]
            taken = int(random.integers(1, left + 1)) if left else 0
            for plan in plans:
                for planned in plan[:taken]:
                    np.add.at(visited, planned.rows_B[planned.weight_B > 0], 1)
            step, steps_taken = step + taken, steps_taken + taken
            if taken == left:
                assert (visited == epoch + 1).all()
                epoch, step = epoch + 1, 0
        assert steps_taken <= epochs * (-(-rows // batch) + 8)  # uneven rests cost a few short steps at most


def test_a_worker_without_rows_or_too_few_steps_is_refused():
    with pytest.raises(ValueError, match="more workers than rows"):
        epoch_plan(0, 0, range(3, 3), Share(2), 1)
    with pytest.raises(ValueError, match="do not fit"):
        epoch_plan(0, 0, range(10), Share(3), 3)


@pytest.mark.parametrize(("rows", "batch"), [(100, 10), (103, 10), (3, 128)])
def test_global_batches_are_a_permutation_cut_in_order(rows, batch):
    batches = global_batches(4, 1, rows, batch)
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert all(len(part) == batch for part in batches[:-1])
    assert 0 < len(batches[-1]) <= batch
    if rows > 3:
        assert not np.array_equal(np.concatenate(batches), np.concatenate(global_batches(4, 2, rows, batch)))
