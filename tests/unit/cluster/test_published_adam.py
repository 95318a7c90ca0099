"""Protects `glo.latent_optimizer=published`: the arithmetic of the published code, which makes a new dense Adam over
all codes in every epoch, whatever the number of workers and wherever the epoch is interrupted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.latent_shard import LatentShard
from glann.cluster.row_optimizers import PublishedAdam, Visit
from torch import Tensor, nn

ROWS, DIM, BATCH, EPOCHS = 23, 6, 4, 4  # six steps, the last of three rows
RATES, BETAS = (0.05, 0.05, 0.025, 0.025), (0.5, 0.999)


def plan(seed: int) -> list[list[np.ndarray]]:
    """The batches of every epoch."""
    rng = np.random.default_rng(seed)
    return [np.array_split(rng.permutation(ROWS), -(-ROWS // BATCH)) for _ in range(EPOCHS)]


def losses(z_BD: Tensor, rows_B: np.ndarray, target_NK: Tensor, weight_DK: Tensor) -> Tensor:
    """The loss of each row: squared error of a linear map, so that gradients depend on where the codes are.

    Some rows have gradients as small as Adam's eps, where the division by the batch can be seen.
    """
    size_N = 10.0 ** torch.linspace(-9, 1, ROWS, dtype=torch.float64)
    at_B = torch.from_numpy(rows_B)
    return size_N[at_B] * (z_BD @ weight_DK - target_NK[at_B]).square().mean(1)


def problem(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target_NK = torch.randn(ROWS, 9, generator=generator, dtype=torch.float64)
    return target_NK, torch.randn(DIM, 9, generator=generator, dtype=torch.float64)


def dense(z_ND: np.ndarray, seed: int) -> np.ndarray:
    """The published loop (glo.py, model.py of yedidh/glann) with torch's own Adam, in float64."""
    table = nn.Embedding(ROWS, DIM, _weight=torch.tensor(z_ND, dtype=torch.float64))
    target_NK, weight_DK = problem(seed)
    for epoch, batches in enumerate(plan(seed)):
        optimizer = torch.optim.Adam(table.parameters(), lr=RATES[epoch], betas=BETAS)
        for rows_B in batches:
            table.zero_grad(set_to_none=False)
            z_BD = table(torch.from_numpy(rows_B))
            unit_BD = z_BD / z_BD.norm(2, 1).detach()[:, None]
            (losses(unit_BD, rows_B, target_NK, weight_DK).sum() / BATCH).backward()
            optimizer.step()
        table.weight.data = table.weight.data / table.weight.data.norm(2, 1)[:, None]
    return table.weight.detach().numpy()


def ours(seed: int, world: int, init_scale: float | None, resume_at: tuple[int, int] | None = None) -> np.ndarray:
    """The same through the shards of `world` workers, which are lost and restored after `resume_at`."""
    cuts = np.array_split(np.arange(ROWS), world)
    options = {"optimizer": "published", "betas": BETAS, "batch": BATCH, "init_scale": init_scale}
    shards = [LatentShard(range(cut[0], cut[-1] + 1), DIM, seed=5, **options) for cut in cuts]
    target_NK, weight_DK = problem(seed)
    for epoch, batches in enumerate(plan(seed)):
        for step, rows_B in enumerate(batches):
            for number, shard in enumerate(shards):
                own_B = rows_B[(rows_B >= shard.rows.start) & (rows_B < shard.rows.stop)]
                z_BD = torch.from_numpy(shard.gather(own_B)).double().requires_grad_()
                losses(z_BD, own_B, target_NK, weight_DK).sum().backward()
                shard.apply(epoch, step, own_B, z_BD.grad.float().numpy(), RATES[epoch], steps=len(batches))
                if (epoch, step) == resume_at:
                    shards[number] = LatentShard(shard.rows, DIM, seed=99, **options)
                    shards[number].restore(shard.snapshot(), shard.position)
    return np.concatenate([shard.codes() for shard in shards])


@pytest.mark.parametrize("init_scale", [None, 0.01])
def test_codes_end_where_a_new_dense_adam_in_every_epoch_leaves_them(init_scale):
    seed = 7
    first = LatentShard(range(ROWS), DIM, seed=5, init_scale=init_scale).snapshot()["z"]
    expected = dense(first, seed)
    assert np.abs(expected - first).max() > 0.3
    np.testing.assert_allclose(ours(seed, 1, init_scale), expected, atol=2e-6)


def test_workers_and_an_interruption_in_the_middle_of_an_epoch_change_no_bit():
    whole = ours(3, 1, 0.01)
    np.testing.assert_array_equal(ours(3, 3, 0.01), whole)
    np.testing.assert_array_equal(ours(3, 2, 0.01, resume_at=(1, 2)), whole)
    np.testing.assert_array_equal(ours(3, 1, 0.01, resume_at=(0, 3)), whole)


def test_the_part_of_a_movement_that_is_left_out_is_below_rounding():
    """A visit at the first of 1,500 steps, against every one of them."""
    optimizer, g = PublishedAdam(BETAS, batch=1), torch.tensor([[1e-9, 1e-4, 1.0]])
    z_BD = torch.tensor([[0.0, 0.0, 1.0]])
    moved = optimizer.update(z_BD, g, {}, torch.ones(1), Visit(1.0, 0, 1500))
    table = nn.Parameter(z_BD.double())
    adam = torch.optim.Adam([table], lr=1.0, betas=BETAS)
    for step in range(1500):
        table.grad = g.double() * (step == 0)
        adam.step()
    torch.testing.assert_close(moved.double(), table.data, rtol=1e-6, atol=1e-7)


def test_a_table_without_moments_takes_a_third_of_the_memory_and_its_steps_must_be_given():
    shard = LatentShard(range(4), DIM, seed=0, optimizer="published")
    assert set(shard.snapshot()) == {"z", "steps"}
    before = shard.snapshot()
    with pytest.raises(ValueError, match="step 0 of 0"):
        shard.apply(0, 0, [1], np.ones((1, DIM), np.float32), 0.1)
    for name, array in shard.snapshot().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("optimizer", ["adam", "published"])
def test_a_small_start_is_seen_projected_and_left_at_the_first_visit_also_by_rows_that_are_skipped(optimizer):
    shard = LatentShard(range(40), 64, seed=5, optimizer=optimizer, init_scale=0.01)
    on_sphere = LatentShard(range(40), 64, seed=5).codes()
    stored = shard.snapshot()["z"]
    assert 0.06 < np.linalg.norm(stored, axis=1).mean() < 0.1  # 0.01 sqrt(64)
    np.testing.assert_allclose(shard.gather(range(40)), on_sphere, atol=1e-6)
    gradient = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    shard.apply(0, 0, [3, 4], gradient, 0.01, skipped=[5], steps=2)
    norms = np.linalg.norm(shard.snapshot()["z"], axis=1)
    np.testing.assert_allclose(norms[3:6], 1, atol=1e-6)
    assert norms[6] < 0.2
    cosine = (shard.codes() * on_sphere).sum(1)
    assert cosine[5] > 1 - 1e-6
    assert cosine[3:5].max() < 0.85  # a step of 0.01 on each axis turns a code of norm 0.08 by 45 degrees
