"""Optimisers with state per row: a row that is not visited does not move.

Pure arithmetic on the rows of one batch, gathered by the caller. Moments and step counter belong to the row, so its
path depends on its own visits alone, never on the composition of batches.

Legend: B rows of a batch, D latent dimension, n rows of a shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Moments = dict[str, Tensor]
Name = Literal["adam", "adagrad", "published", "none"]
NEGLIGIBLE = 2.0**-60  # share of a row's first movement below which later ones are left out


class Visit(NamedTuple):
    """A visit of rows. lr: learning rate. step, steps: the step of the epoch, from 0, and their number."""

    lr: float
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class RowAdam:
    """Adam (Kingma & Ba 2015, Algorithm 1) with bias correction per row. State: 2 D numbers a row."""

    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8

    def moments(self, n: int, dim: int) -> Moments:
        """Initial state of n rows."""
        return {"exp_avg": torch.zeros(n, dim), "exp_avg_sq": torch.zeros(n, dim)}

    def update(self, z_BD: Tensor, grad_BD: Tensor, moments_B: Moments, visits_B: Tensor, visit: Visit) -> Tensor:
        """One step of the rows of a batch.

        Args:
            z_BD, grad_BD: float32 codes and the gradient of each row's own loss.
            moments_B: the state of these rows, changed in place.
            visits_B: visits of each row since the start of the run, this one included.
        Returns:
            The updated codes, not yet projected.
        """
        beta1, beta2 = self.betas
        mean, square = moments_B["exp_avg"], moments_B["exp_avg_sq"]
        mean.lerp_(grad_BD, 1 - beta1)
        square.mul_(beta2).addcmul_(grad_BD, grad_BD, value=1 - beta2)
        # In float32, 1 - beta**t suffers from cancellation while t is small.
        visits_B1 = visits_B.double()[:, None]
        rate_B1 = (visit.lr / (1 - beta1**visits_B1)).float()
        scale_B1 = (1 - beta2**visits_B1).rsqrt().float()
        return z_BD - rate_B1 * mean / ((square.sqrt() * scale_B1).add_(self.eps))


@dataclass(frozen=True)
class RowAdagrad:
    """Row-wise Adagrad (Duchi et al. 2011): one accumulator of the mean squared gradient a row."""

    eps: float = 1e-10

    def moments(self, n: int, dim: int) -> Moments:
        """Initial state of n rows: one number each, whatever the dimension."""
        return {"accumulator": torch.zeros(n)}

    def update(self, z_BD: Tensor, grad_BD: Tensor, moments_B: Moments, visits_B: Tensor, visit: Visit) -> Tensor:
        """One step of the rows of a batch; arguments as in `RowAdam.update`."""
        accumulator_B = moments_B["accumulator"]
        accumulator_B.add_(grad_BD.square().mean(dim=1))
        return z_BD - (visit.lr / (accumulator_B.sqrt() + self.eps))[:, None] * grad_BD


@dataclass(frozen=True)
class PublishedAdam:
    """The optimiser of the published code (github.com/yedidh/glann, glo.py), without its table of moments.

    That code makes a new dense Adam over all codes in every epoch of T steps. A row that is visited at step t does not
    move before it, since its moments are zero; afterwards it moves at every step k from t to T, by
    lr m_k / (sqrt(v_k) + eps) with m_k and v_k decayed from its one gradient and bias corrections that count the
    steps of the epoch. No batch reads it again in that epoch, so the whole movement is made at once, at its visit. It
    is projected then, as that code does at the end of the epoch, and needs no state between epochs.

    As there, the gradient is that of the mean over `batch` images, and a code of another norm than 1 is divided by its
    norm in front of G, with no gradient through the norm. Both matter for `eps` alone.
    """

    betas: tuple[float, float] = (0.5, 0.999)
    batch: int = 1
    eps: float = 1e-8

    def moments(self, n: int, dim: int) -> Moments:
        """No state."""
        return {}

    def update(self, z_BD: Tensor, grad_BD: Tensor, moments_B: Moments, visits_B: Tensor, visit: Visit) -> Tensor:
        """The movement of rows over the rest of an epoch, in float64; arguments as in `RowAdam.update`.

        Raises:
            ValueError: the visit is not a step of an epoch.
        """
        if not 0 <= visit.step < visit.steps:
            raise ValueError(f"step {visit.step} of {visit.steps} is not one of an epoch")
        beta1, beta2 = self.betas
        z64_BD = z_BD.double()
        grad64_BD = grad_BD.double() / (self.batch * torch.linalg.vector_norm(z64_BD, dim=1, keepdim=True))
        size_BD, moved_BD = grad64_BD.abs(), torch.zeros_like(z64_BD)
        for step in range(visit.step + 1, visit.steps + 1):
            since = step - visit.step - 1
            mean = beta1**since * (1 - beta1) / (1 - beta1**step)
            root = math.sqrt(beta2**since * (1 - beta2) / (1 - beta2**step))
            if mean < NEGLIGIBLE * root:
                break
            moved_BD += mean * grad64_BD / (root * size_BD + self.eps)
        return (z64_BD - visit.lr * moved_BD).float()


@dataclass(frozen=True)
class Untrained:
    """No optimiser and no state, for codes that an encoder writes (`LatentShard.replace`)."""

    def moments(self, n: int, dim: int) -> Moments:
        """No state."""
        return {}

    def update(self, z_BD: Tensor, grad_BD: Tensor, moments_B: Moments, visits_B: Tensor, visit: Visit) -> Tensor:
        """Raises ValueError: an encoder is trained in their place."""
        raise ValueError("codes of an encoder are replaced, not trained")


RowOptimizer = RowAdam | RowAdagrad | PublishedAdam | Untrained


def row_optimizer(name: Name, betas: tuple[float, float], batch: int = 1) -> RowOptimizer:
    """The optimiser of that name; `betas` apply to both kinds of Adam, `batch` to the published one."""
    if name == "published":
        return PublishedAdam(betas, batch)
    if name == "none":
        return Untrained()
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
