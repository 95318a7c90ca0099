"""Optimisers with state per row: a row that is not visited does not move.

Pure arithmetic on the rows of one batch, gathered by the caller. Moments and step counter belong to the row, so its
path depends on its own visits alone, never on the composition of batches.

Legend: B rows of a batch, D latent dimension, n rows of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Moments = dict[str, Tensor]


@dataclass(frozen=True)
class RowAdam:
    """Adam (Kingma & Ba 2015, Algorithm 1) with bias correction per row. State: 2 D numbers a row."""

    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8

    def moments(self, n: int, dim: int) -> Moments:
        """Initial state of n rows."""
        return {"exp_avg": torch.zeros(n, dim), "exp_avg_sq": torch.zeros(n, dim)}

    def update(self, z_BD: Tensor, grad_BD: Tensor, moments_B: Moments, visits_B: Tensor, lr: float) -> Tensor:
        """One step of the rows of a batch.

        Args:
            z_BD, grad_BD: float32 codes and the gradient of each row's own loss.
            moments_B: the state of these rows, changed in place.
            visits_B: visits of each row, this one included.
        Returns:
            The updated codes, not yet projected.
        """
        beta1, beta2 = self.betas
        mean, square = moments_B["exp_avg"], moments_B["exp_avg_sq"]
        mean.lerp_(grad_BD, 1 - beta1)
        square.mul_(beta2).addcmul_(grad_BD, grad_BD, value=1 - beta2)
        # In float32, 1 - beta**t suffers from cancellation while t is small.
        visits_B1 = visits_B.double()[:, None]
        rate_B1 = (lr / (1 - beta1**visits_B1)).float()
        scale_B1 = (1 - beta2**visits_B1).rsqrt().float()
        return z_BD - rate_B1 * mean / ((square.sqrt() * scale_B1).add_(self.eps))


@dataclass(frozen=True)
class RowAdagrad:
    """Row-wise Adagrad (Duchi et al. 2011): one accumulator of the mean squared gradient a row."""

    eps: float = 1e-10

    def moments(self, n: int, dim: int) -> Moments:
        """Initial state of n rows: one number each, whatever the dimension."""
        return {"accumulator": torch.zeros(n)}

    def update(self, z_BD: Tensor, grad_BD: Tensor, moments_B: Moments, visits_B: Tensor, lr: float) -> Tensor:
        """One step of the rows of a batch; arguments as in `RowAdam.update`."""
        accumulator_B = moments_B["accumulator"]
        accumulator_B.add_(grad_BD.square().mean(dim=1))
        return z_BD - (lr / (accumulator_B.sqrt() + self.eps))[:, None] * grad_BD


RowOptimizer = RowAdam | RowAdagrad


def row_optimizer(name: Literal["adam", "adagrad"], betas: tuple[float, float]) -> RowOptimizer:
    """The optimiser of that name; `betas` apply to Adam."""
    return RowAdam(betas) if name == "adam" else RowAdagrad()


def usable_rows(grad_BD: Tensor) -> Tensor:
    """Whether each row's gradient and its square are finite, so that its optimiser's state stays finite too (bool_B).

    The square of a float32 above 1.8e19 is infinite. This one definition holds for the shard, which refuses the rows,
    and for a step, which is skipped before they come to it.
    """
    return grad_BD.square().isfinite().all(dim=1)


def gradient_fault(grad_BD: Tensor) -> Tensor:
    """0 if all rows are usable, else NaN: summed over workers, the same verdict on each of them."""
    return torch.where(usable_rows(grad_BD).all(), 0.0, torch.nan)
