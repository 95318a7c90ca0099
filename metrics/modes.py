"""The number of different images of a sampler, by the birthday paradox (Arora, Risteski & Zhang 2018).

Of s draws from n equally likely modes, s (s - 1) / 2n pairs are of one mode, on average. Two samples count as one mode
if they are nearer to one another than the real images, but for 1 %, are to their nearest neighbours.

Legend: N samples, R real images, B a block.
"""

from __future__ import annotations

import numpy as np

from ..errors import UserError
from .distances import others_blocks
from .tally import KeptFeatures

ALIKE = 0.01  # share of real images whose nearest neighbour is taken for the same image


def count_modes(real: KeptFeatures, drawn: KeptFeatures) -> float:
    """The number of modes that would give as many pairs of samples of one mode.

    Without any such pair there may be more modes than samples can show: the result is then the number at which that
    was as likely as not.

    Raises:
        UserError: fewer than two images in a set.
    """
    reach = float(np.quantile(real.near(1), ALIKE))
    pairs = sum(int((distance_BN <= reach).sum()) for _, distance_BN in others_blocks(drawn.features_NF)) // 2
    return modes_of(len(drawn), pairs)


def modes_of(draws: int, pairs: int) -> float:
    """The number of modes estimated from `pairs` of one mode among `draws`.

    Raises:
        UserError: fewer than two draws.
    """
    if draws < 2:
        raise UserError("the number of modes is estimated from pairs of samples; draw at least 2")
    if pairs > 0:
        return draws * (draws - 1) / (2 * pairs)
    few, many = float(draws), float(draws) ** 2  # the probability of a pair is above a half, and below it
    for _ in range(100):
        middle = (few + many) / 2
        few, many = (middle, many) if pair_probability(draws, middle) > 0.5 else (few, middle)
    return many


def pair_probability(draws: int, modes: float) -> float:
    """The probability that two of `draws` are of one mode, of `modes` equally likely ones (at least `draws`)."""
    return float(-np.expm1(np.log1p(-np.arange(draws) / modes).sum()))
