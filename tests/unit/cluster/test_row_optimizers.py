"""Protects the latent codes' optimisers and their table: exact per-row arithmetic, and nothing else moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.latent_shard import LatentShard
from glann.cluster.latents import LatentTable
from glann.cluster.row_optimizers import usable_rows
from glann.errors import UserError
from glann.models.noise import Stream, noise

DIM, LR, BETAS = 7, 0.05, (0.5, 0.999)


class AdamRow:
    """Adam of one row as in the paper's Algorithm 1, float64, then the projection."""

    def __init__(self, z, constraint):
        self.z, self.m, self.v, self.t, self.constraint = np.array(z, np.float64), 0.0, 0.0, 0, constraint

    def step(self, g):
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        self.z = self.z - LR * (self.m / (1 - BETAS[0] ** self.t)) / (np.sqrt(self.v / (1 - BETAS[1] ** self.t)) + 1e-8)
        self.project()

    def project(self):
        norm = np.linalg.norm(self.z)
        if self.constraint == "sphere" or norm > 1:
            self.z = self.z / norm


class AdagradRow(AdamRow):
    def step(self, g):
        self.v = self.v + np.mean(g**2)
        self.z = self.z - LR * g / (np.sqrt(self.v) + 1e-10)
        self.project()


def shard(rows=range(100, 150), **options) -> LatentShard:
    return LatentShard(rows, DIM, seed=5, **options)


def gradients(rng, count):
    return rng.standard_normal((count, DIM)).astype(np.float32)


@pytest.mark.parametrize("constraint", ["sphere", "ball"])
@pytest.mark.parametrize(("optimizer", "reference"), [("adam", AdamRow), ("adagrad", AdagradRow)])
def test_every_row_follows_its_own_optimiser(optimizer, reference, constraint):
    seed = np.random.SeedSequence().entropy
    rng, table = np.random.default_rng(seed), shard(optimizer=optimizer, constraint=constraint, betas=BETAS)
    rows = {row: reference(z, constraint) for row, z in zip(table.rows, table.codes(), strict=True)}
    for step in range(60):  # rows are visited unequally often, so bias corrections differ within a batch
        batch = rng.choice(np.arange(100, 150), rng.integers(1, 20), replace=False)
        grad = gradients(rng, len(batch)) * 10 ** rng.uniform(-3, 3)
        assert table.apply(0, step, batch, grad, LR)
        for row, g in zip(batch, grad.astype(np.float64), strict=True):
            rows[row].step(g)
    expected = np.stack([row.z for row in rows.values()])
    np.testing.assert_allclose(table.codes(), expected, atol=2e-5, err_msg=f"seed {seed}")
    if optimizer == "adam":
        np.testing.assert_array_equal(table.visits(), [row.t for row in rows.values()])


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_rows_not_in_the_batch_do_not_move(optimizer):
    rng, table = np.random.default_rng(), shard(optimizer=optimizer)
    for step in range(3):
        before = table.snapshot()
        batch = rng.choice(np.arange(100, 150), 9, replace=False)
        table.apply(0, step, batch, gradients(rng, 9), LR)
        others = np.setdiff1d(np.arange(50), batch - 100)
        for name, array in table.snapshot().items():
            np.testing.assert_array_equal(array[others], before[name][others])
            assert (array[batch - 100] != before[name][batch - 100]).any()


def test_norms_are_one_after_every_apply():
    rng, table = np.random.default_rng(), shard()
    for step, size in enumerate((1e-30, 1e-3, 1.0, 1e15)):
        table.apply(0, step, table.rows, gradients(rng, 50) * np.float32(size), LR)
        np.testing.assert_allclose(np.linalg.norm(table.codes().astype(np.float64), axis=1), 1, atol=3e-7)


def test_a_duplicate_or_late_apply_changes_nothing():
    rng, table = np.random.default_rng(), shard()
    assert table.apply(1, 5, [101, 102], gradients(rng, 2), LR)
    before = table.snapshot()
    for position in ((1, 5), (1, 4), (0, 9)):
        assert not table.apply(*position, [101, 103], gradients(rng, 2), LR)
        assert not table.skip(*position, [104])
    for name, array in table.snapshot().items():
        np.testing.assert_array_equal(array, before[name])
    assert table.apply(2, 0, [101], gradients(rng, 1), LR)


def test_skipped_rows_are_visited_but_do_not_move():
    rng, table = np.random.default_rng(), shard()
    before = table.codes()
    table.apply(0, 0, [100, 101], gradients(rng, 2), LR, skipped=[102])
    table.skip(0, 1, [103, 104])
    assert table.visits()[:6].tolist() == [1, 1, 1, 1, 1, 0]
    np.testing.assert_array_equal(table.codes()[2:], before[2:])
    assert (table.codes()[:2] != before[:2]).any(axis=1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e25])
def test_an_unusable_gradient_is_refused_by_row_and_changes_nothing(value):
    rng, table = np.random.default_rng(), shard()
    before, grad = table.snapshot(), gradients(rng, 3)
    grad[1, 2] = value
    assert usable_rows(torch.from_numpy(grad)).tolist() == [True, False, True]
    with pytest.raises(UserError, match=r"rows \[111\]"):
        table.apply(0, 0, [110, 111, 112], grad, LR)
    for name, array in table.snapshot().items():
        np.testing.assert_array_equal(array, before[name])
    assert table.apply(0, 0, [110], grad[:1], LR)


def test_foreign_repeated_and_misshapen_rows_are_refused():
    rng, table = np.random.default_rng(), shard()
    for row in (99, 150, -1):
        with pytest.raises(IndexError, match=r"100\.\.149"):
            table.gather([100, row])
    with pytest.raises(ValueError, match="twice"):
        table.apply(0, 0, [101, 101], gradients(rng, 2), LR)
    with pytest.raises(ValueError, match="twice"):
        table.apply(0, 0, [101], gradients(rng, 1), LR, skipped=[101])
    with pytest.raises(ValueError, match="shape"):
        table.apply(0, 0, [101], gradients(rng, 2), LR)
    assert not table.visits().any()


def test_first_codes_depend_on_the_row_and_the_seed_only():
    whole = shard(range(20)).codes()
    np.testing.assert_array_equal(np.concatenate([shard(range(7)).codes(), shard(range(7, 20)).codes()]), whole)
    e = noise(5, 0, torch.arange(20), DIM, stream=Stream.LATENTS).double()
    np.testing.assert_allclose(whole, e / e.norm(dim=1, keepdim=True), atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_a_restored_table_goes_on_bit_for_bit(optimizer):
    rng, one, two = np.random.default_rng(), shard(optimizer=optimizer), shard(optimizer=optimizer)
    grads = [gradients(rng, 50) for _ in range(6)]
    for step, grad in enumerate(grads[:3]):
        one.apply(0, step, one.rows, grad, LR)
    two.restore(one.snapshot(), (0, 2))
    assert not two.apply(0, 2, two.rows, grads[0], LR)
    for step, grad in enumerate(grads[3:], 3):
        assert one.apply(0, step, one.rows, grad, LR)
        assert two.apply(0, step, two.rows, grad, LR)
    for name, array in one.snapshot().items():
        np.testing.assert_array_equal(array, two.snapshot()[name])


def test_a_snapshot_of_another_kind_is_refused_and_changes_nothing():
    table, before = shard(), shard().snapshot()
    good = table.snapshot()
    for bad, reason in (
        (shard(optimizer="adagrad").snapshot(), "latent_optimizer"),
        (shard(range(3)).snapshot(), r"\[50, 7\]"),
        (good | {"z": good["z"].astype(np.float64)}, "float64"),
    ):
        with pytest.raises(UserError, match=reason):
            table.restore(bad)
    for name, array in table.snapshot().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_table_in_process_raises_the_error_of_an_update_at_the_next_update():
    table = LatentTable.in_process(range(10), DIM, 0)
    table.apply(0, 0, [3], torch.full((1, DIM), float("nan")), LR)
    with pytest.raises(UserError, match=r"rows \[3\]"):
        table.apply(0, 1, [4], torch.zeros(1, DIM), LR)


def test_codes_gathered_ahead_of_an_update_are_gathered_again():
    table = LatentTable.in_process(range(10), DIM, 0)
    table.prefetch([1, 2])
    table.prefetch([3, 4])
    table.apply(0, 0, [2, 5], torch.randn(2, DIM), LR)
    np.testing.assert_array_equal(table.gather([1, 2]), table.codes()[[1, 2]])
    np.testing.assert_array_equal(table.gather([3, 4]), table.codes()[[3, 4]])
