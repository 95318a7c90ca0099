"""Learning rates of latent codes by the number of images and the batch.

The published rates (0.01, 0.003) are those of an optimiser that moves a code many times for one visit: a dense Adam
over all codes that is made anew in every epoch of T = ceil(N / batch) steps (`row_optimizers.PublishedAdam`). Of a
gradient g at step t, its first moment at step k >= t is (1 - b1) b1^(k-t) g and its second (1 - b2) b2^(k-t) g^2,
both divided by 1 - b^k. So at step k the row moves by

    lr sign(g) r^(k-t) u_k,   r = b1 / sqrt(b2),   u_k = (1 - b1) / (1 - b1^k) sqrt((1 - b2^k) / (1 - b2)).

The sum over k = t..T, averaged over the visits t = 1..T, is, with the sums exchanged,

    movement(T) = 1/T sum_{k=1..T} u_k (1 - r^k) / (1 - r),

1 for T = 1, 4.2 for T = 39 (5,000 images, batch 128), 13.5 for T = 468 (60,000), and at most
1 / sqrt(1 - b2) (1 - b1) / (1 - r), about 31.6. Of one Adam per row, a visit moves a code by one lr on average, over
many visits: its first moment delays a gradient and spreads it over later visits, but the weights of a gradient add up
to 1, so that the displacement is the same for gradients that agree (lr a visit) and for independent ones (lr
sqrt(visits)). Hence the rate that moves codes as far is movement(T) times the published one.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from ..config.sections import GloConfig


@lru_cache
def movement(steps: int, betas: tuple[float, float] = (0.5, 0.999)) -> float:
    """Mean movement of a code per visit under the published optimiser, in units of its learning rate.

    Args:
        steps: steps of an epoch, T.
        betas: of Adam, with b1^2 < b2 < 1: else a first moment outlives its second, and movements have no bound.
    Raises:
        ValueError: less than one step, or other betas.
    """
    beta1, beta2 = betas
    if steps < 1 or not beta1**2 < beta2 < 1:
        raise ValueError(f"an epoch of {steps} steps with betas {betas}")
    k_T, ratio = np.arange(1, steps + 1, dtype=np.float64), beta1 / math.sqrt(beta2)
    means_T = (1 - beta1) / (1 - beta1**k_T)
    squares_T = (1 - beta2**k_T) / (1 - beta2)
    visits_T = (1 - ratio**k_T) / (1 - ratio)
    return float(np.mean(means_T * np.sqrt(squares_T) * visits_T))


def latent_lr(glo: GloConfig, rows: int) -> float:
    """The learning rate of the codes of `rows` images: `glo.latent_lr`, where it is `auto` by the rule above."""
    if not isinstance(glo.latent_lr, str):
        return glo.latent_lr
    if glo.latent_optimizer == "published":
        return glo.published_lr
    return glo.published_lr * movement(math.ceil(rows / glo.batch_size), glo.betas)
