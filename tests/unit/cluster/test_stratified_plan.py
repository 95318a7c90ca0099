"""The batches of networks: the same for any number of workers, each row once, read by its owner."""

from __future__ import annotations

import numpy as np
import pytest
from glann.cluster.placement import Share, ranges, stratified_plan


def batches(seed: int, epoch: int, rows: int, batch: int, world: int, accumulation: int = 1, first: int = 0):
    """For every worker, its plan."""
    return [
        stratified_plan(seed, epoch, rows, batch, Share(batch, rank, world, accumulation), first)
        for rank in range(world)
    ]


def whole(plans) -> list[list[int]]:
    """The sorted rows of every global batch."""
    return [
        sorted(int(row) for planned in step for row in planned.rows_B[planned.weight_B > 0])
        for step in zip(*plans, strict=True)
    ]


SIZES = [(101, 10), (26, 8), (5000, 64), (64, 64), (65, 64), (7, 3), (10001, 100), (12, 1)]


@pytest.mark.parametrize(("rows", "batch"), SIZES)
def test_the_number_of_workers_changes_no_batch(rows, batch):
    alone = whole(batches(3, 2, rows, batch, 1))
    assert sorted(row for one in alone for row in one) == list(range(rows))  # every row once
    sizes = {len(one) for one in alone}
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    for world in (2, 3, 5):
        if world <= rows:
            assert whole(batches(3, 2, rows, batch, world)) == alone


@pytest.mark.parametrize(("rows", "batch"), SIZES)
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (3, 2), (8, 1)])
def test_workers_take_equal_steps_of_their_own_rows(rows, batch, world, accumulation):
    if world > rows:
        return
    plans, owns = batches(0, 0, rows, batch, world, accumulation), ranges(rows, world)
    assert len({len(plan) for plan in plans}) == 1
    assert len({len(planned.rows_B) for plan in plans for planned in plan}) == 1
    assert len(plans[0][0].rows_B) % accumulation == 0
    for plan, own in zip(plans, owns, strict=True):
        assert all(int(row) in own for planned in plan for row in planned.rows_B)
    if batch >= 64:  # hardly any padding
        assert len(plans[0][0].rows_B) <= -(-batch // world) + 1 + accumulation


def test_an_epoch_is_resumed_at_any_step_and_epochs_and_seeds_differ():
    straight = batches(1, 4, 101, 10, 2)
    for first in (1, 7, 10):
        for plan, later in zip(straight, batches(1, 4, 101, 10, 2, first=first), strict=True):
            assert [planned.step for planned in later] == list(range(first, 11))
            for planned, again in zip(plan[first:], later, strict=True):
                assert np.array_equal(planned.rows_B, again.rows_B)
                assert np.array_equal(planned.weight_B, again.weight_B)
    assert whole(straight) != whole(batches(1, 5, 101, 10, 2))
    assert whole(straight) != whole(batches(2, 4, 101, 10, 2))
