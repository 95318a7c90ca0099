"""Protects the rule for the rate of codes: as far a movement as under the published optimiser, for 1,000, 5,000 and
60,000 images, in its formula, on random gradients through both optimisers, and through the configuration."""

from __future__ import annotations

import math

import pytest
import torch
from glann.cluster.latent_rates import latent_lr, movement
from glann.cluster.row_optimizers import PublishedAdam, RowAdam, Visit
from glann.config.run import load
from glann.errors import UserError
from torch import Tensor, nn

SIZES = {1_000: 8, 5_000: 40, 60_000: 469}  # images, and steps of an epoch in batches of 128
PATHS, DIM, EPOCHS = 200, 16, 40


@pytest.mark.parametrize(("steps", "value"), [(1, 1.0), (8, 2.04), (39, 4.2), (40, 4.3), (468, 13.5), (781_250, 31.6)])
def test_the_multiplier_has_the_values_that_the_documents_state(steps, value):
    assert movement(steps) == pytest.approx(value, rel=0.015)


@pytest.mark.parametrize("betas", [(0.5, 0.999), (0.9, 0.99), (0.0, 0.999), (0.9, 0.85)])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_the_multiplier_is_the_mean_movement_under_torchs_dense_adam(steps, betas):
    """One row for each step of the epoch, with its gradient there and zeros at all others."""
    table = nn.Parameter(torch.zeros(steps, 1, dtype=torch.float64))
    adam = torch.optim.Adam([table], lr=1.0, betas=betas, eps=0.0)
    for step in range(steps):
        table.grad = torch.zeros_like(table)
        table.grad[step] = -0.3
        before = table.detach().clone()
        adam.step()
        table.data = torch.where(table.isfinite(), table.data, before)  # 0 / 0 before a row's visit
    assert movement(steps, betas) == pytest.approx(float(table.detach().mean()), rel=1e-9)


@pytest.mark.parametrize(("steps", "betas"), [(0, (0.5, 0.999)), (5, (0.9, 0.8)), (5, (0.5, 1.0)), (5, (0.0, 0.0))])
def test_a_movement_without_a_bound_is_refused(steps, betas):
    with pytest.raises(ValueError, match="epoch of"):
        movement(steps, betas)


def paths(share: float, steps: int) -> tuple[Tensor, Tensor]:
    """Displacements of codes under our Adam at the rate of the rule and the published one, in units of its rate.

    Args:
        share: how much of a row's gradient is the same in all epochs.
    """
    torch.manual_seed(0)
    lasting, code, ours = torch.randn(PATHS, DIM), torch.ones(PATHS, DIM) / math.sqrt(DIM), RowAdam()
    z, moments, published = torch.zeros(PATHS, DIM), ours.moments(PATHS, DIM), torch.zeros(PATHS, DIM)
    for epoch in range(EPOCHS):
        grad = share * lasting + (1 - share) * torch.randn(PATHS, DIM)
        z = ours.update(z, grad, moments, torch.full((PATHS,), epoch + 1), Visit(movement(steps)))
        step_of = torch.randint(0, steps, (PATHS,))
        for step in step_of.unique():
            at = step_of == step
            visit = Visit(1e-3, int(step), steps)
            published[at] += 1e3 * (PublishedAdam().update(code[at], grad[at], {}, torch.ones(1), visit) - code[at])
    return z, published


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", SIZES)
def test_codes_move_as_far_per_epoch_as_under_the_published_optimiser(rows, share):
    """Within 12 %, for gradients that are independent in every epoch, that agree, and in between.

    Without the rule they move 0.49 to 0.07 as far.
    """
    ours, published = paths(share, SIZES[rows])
    assert float(ours.norm(dim=1).mean() / published.norm(dim=1).mean()) == pytest.approx(1, abs=0.12)


def test_the_rate_comes_from_the_configuration_and_the_number_of_images():
    glo = load("digits", ["glo.latent_lr=auto", "glo.published_lr=0.003"]).glo
    for rows, steps in SIZES.items():
        assert latent_lr(glo, rows) == 0.003 * movement(steps)
    assert latent_lr(load("digits", ["glo.latent_lr=0.05"]).glo, 5_000) == 0.05
    assert load("digits", ["glo.latent_lr=1e-2"]).glo.latent_lr == 0.01  # YAML reads text
    published = load("digits", ["glo.latent_lr=auto", "glo.latent_optimizer=published"]).glo
    assert latent_lr(published, 5_000) == published.published_lr == 0.01


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["glo.latent_lr=auto", "glo.latent_optimizer=adagrad"], "set glo.latent_lr to a number"),
        (["glo.latent_lr=auto", "glo.betas=[0.9, 0.5]"], "first squared below the second"),
        (["glo.latent_optimizer=published", "glo.betas=[0.5, 1.0]"], "first squared below the second"),
        (["glo.latent_optimizer=published", "glo.constraint=ball"], "set glo.constraint=sphere"),
        (["glo.latent_lr=automatic"], "glo.latent_lr='automatic' is not possible"),
        (["glo.latent_lr=-1"], "glo.latent_lr=-1 is not possible: input should be greater than 0"),
        (["glo.latent_lr=[1]"], "glo.latent_lr=[1] is not possible: input should be a valid number"),
        (["glo.latent_lr=null"], "glo.latent_lr=None is not possible: input should be a valid number"),
    ],
)
def test_combinations_without_a_meaning_are_refused_with_what_to_do(overrides, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as refused:
        load("digits", overrides)
    assert "\n" not in str(refused.value)
