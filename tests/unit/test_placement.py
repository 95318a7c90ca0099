"""Protects the placement of rows: every row is visited exactly once an epoch, by one worker, reproducibly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from glann.cluster.placement import epoch_plan, global_batches, ranges, steps_left, steps_per_epoch


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


@pytest.mark.parametrize(("rows", "world", "batch"), [(100, 1, 10), (101, 2, 10), (103, 4, 7), (5, 5, 3), (64, 3, 64)])
def test_every_row_is_visited_once_and_all_workers_take_equally_many_steps(rows, world, batch):
    steps = steps_per_epoch(rows, world, batch)
    plans = [epoch_plan(3, 2, own, batch, steps) for own in ranges(rows, world)]
    assert {len(plan) for plan in plans} == {steps}
    assert sorted(np.concatenate([real_rows(plan) for plan in plans])) == list(range(rows))
    assert steps == max(-(-len(own) // batch) for own in ranges(rows, world))


def test_padding_rows_can_be_read_by_the_worker_and_weigh_nothing():
    plan = epoch_plan(0, 0, range(20, 25), 4, 3)
    assert all(batch.rows_B.shape == batch.weight_B.shape == (4,) for batch in plan)
    assert all(((batch.rows_B >= 20) & (batch.rows_B < 25)).all() for batch in plan)
    assert [float(batch.weight_B.sum()) for batch in plan] == [4, 1, 0]
    assert plan[0].rows_B.dtype == np.int64
    assert plan[0].weight_B.dtype == np.float32


def test_the_plan_is_a_pure_function_and_differs_between_seeds_epochs_and_ranges():
    def order(seed=1, epoch=1, rows=range(50, 150)):
        return tuple(real_rows(epoch_plan(seed, epoch, rows, 10, 11)) - rows.start)

    assert order() == order()
    assert len({order(), order(seed=2), order(epoch=2), order(rows=range(51, 151))}) == 4


def test_the_order_is_the_same_on_every_machine():
    """The stream of numpy's raw Philox is fixed, so these numbers are."""
    assert real_rows(epoch_plan(0, 0, range(8), 8, 1)).tolist() == [6, 3, 7, 2, 4, 5, 0, 1]


def test_positions_of_a_row_are_uniform():
    rng = np.random.default_rng()
    seed = int(rng.integers(2**32))
    where = [np.argsort(real_rows(epoch_plan(seed, epoch, range(5), 5, 1))) for epoch in range(2000)]
    counts = np.stack([np.bincount(column, minlength=5) for column in np.stack(where).T])
    assert np.abs(counts - 400).max() < 100, f"seed {seed}: {counts}"  # 5.6 standard deviations


def test_a_continued_epoch_is_the_rest_of_the_same_epoch():
    whole = epoch_plan(7, 3, range(100, 137), 5, 8)
    visited = np.full(37, 3)
    for batch in whole[:3]:
        visited[batch.rows_B[batch.weight_B > 0] - 100] += 1
    rest = epoch_plan(7, 3, range(100, 137), 5, steps_left(3, 5, visited), visited, first_step=3)
    assert [batch.step for batch in rest] == [3, 4, 5, 6, 7]
    for a, b in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(a.rows_B, b.rows_B)
        np.testing.assert_array_equal(a.weight_B, b.weight_B)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 5), (4, 1)])
def test_no_row_is_lost_or_visited_twice_when_the_number_of_workers_changes_within_an_epoch(before, after):
    rows, batch, epoch = 101, 4, 2
    visited = np.full(rows, epoch)
    for own in ranges(rows, before):
        for planned in epoch_plan(5, epoch, own, batch, steps_per_epoch(rows, before, batch))[:3]:
            visited[planned.rows_B[planned.weight_B > 0]] += 1
    parts = ranges(rows, after)
    steps = max(steps_left(epoch, batch, visited[own.start : own.stop]) for own in parts)
    for own in parts:
        plan = epoch_plan(5, epoch, own, batch, steps, visited[own.start : own.stop], first_step=3)
        np.add.at(visited, real_rows(plan), 1)
    assert (visited == epoch + 1).all()


def test_a_worker_without_rows_or_too_few_steps_is_refused():
    with pytest.raises(ValueError, match="more workers than rows"):
        epoch_plan(0, 0, range(3, 3), 2, 1)
    with pytest.raises(ValueError, match="do not fit"):
        epoch_plan(0, 0, range(10), 3, 3)


@pytest.mark.parametrize(("rows", "batch"), [(100, 10), (103, 10), (3, 128)])
def test_global_batches_are_a_permutation_cut_in_order(rows, batch):
    batches = global_batches(4, 1, rows, batch)
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert all(len(part) == batch for part in batches[:-1])
    assert 0 < len(batches[-1]) <= batch
    if rows > 3:
        assert not np.array_equal(np.concatenate(batches), np.concatenate(global_batches(4, 2, rows, batch)))
