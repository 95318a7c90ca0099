"""Whether samples are copies of training images: nearest training images against nearest held-out ones.

Legend: T training images, H held-out images, N samples, F feature dimension, B, R images of a block, C cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .distances import Float64, nearest
from .tally import KeptFeatures

Int64 = NDArray[np.int64]

CELLS = 10  # of the training images, at most: a copied region is seen even if samples are too far away elsewhere
IN_A_CELL = 20  # held-out images and samples that a cell needs: normal approximation of the statistic


@dataclass(frozen=True, eq=False)
class Copying:
    """Samples beside their nearest training images and nearest held-out images, in feature space.

    Only training images that were kept (`KeptFeatures`) are searched.
    """

    train: KeptFeatures
    held_out: KeptFeatures
    drawn: KeptFeatures

    @cached_property
    def share(self) -> float:
        """The share of samples that are nearer to a training image than to any of equally many held-out images.

        Without preference it is 0.5, give or take `deviation`; a sample as near to both counts half.
        """
        count = min(len(self.train), len(self.held_out))
        drawn_NF = self.drawn.features_NF
        train_N, _ = self._nearest if count == len(self.train) else _nearest_of(self.train.first(count), drawn_NF)
        held_out_N, _ = _nearest_of(self.held_out.first(count), drawn_NF)
        equal_N = np.isclose(train_N, held_out_N, rtol=1e-6, atol=0)  # an image of both sets; beyond that is rounding
        return float(np.where(equal_N, 0.5, train_N < held_out_N).mean())

    @property
    def deviation(self) -> float:
        """The standard deviation of `share` where there is no preference."""
        return 0.5 / len(self.drawn) ** 0.5

    @cached_property
    def z(self) -> float:
        """C_T of Meehan, Chaudhuri & Dasgupta 2020, Eq. 3: below -3 samples copy, above 3 they are too far away.

        In each cell of the training images, held-out images and samples are ranked by their distance to the nearest
        training image of the cell. The Mann-Whitney statistic, in its standard deviations, is averaged over cells,
        weighted by the held-out images in them.
        """
        train_TF, held_out_HF, drawn_NF = (part.features_NF for part in (self.train, self.held_out, self.drawn))
        cells_T, cells_H, cells_N = _cells(train_TF, held_out_HF, drawn_NF)
        weights, scores = [], []
        for cell in range(int(cells_T.max()) + 1):
            train, held_out, drawn = train_TF[cells_T == cell], held_out_HF[cells_H == cell], drawn_NF[cells_N == cell]
            if min(len(held_out), len(drawn)) >= IN_A_CELL:
                weights.append(len(held_out))
                scores.append(rank_statistic(nearest(drawn, train)[0], nearest(held_out, train)[0]))
        if not weights:
            raise UserError(
                f"no region of the training images has {IN_A_CELL} samples and {IN_A_CELL} held-out images, which the "
                "test of copying needs; draw more samples, or hold out more images"
            )
        return float(np.average(scores, weights=weights))

    @cached_property
    def _nearest(self) -> tuple[Float64, Int64]:
        return _nearest_of(self.train, self.drawn.features_NF)


def nearest_pairs(train: KeptFeatures, drawn: KeptFeatures, count: int) -> tuple[Int64, Int64]:
    """(indices of samples, rows of their nearest training images) of the `count` nearest pairs, nearest first."""
    distance_N, row_N = _nearest_of(train, drawn.features_NF)
    closest = distance_N.argsort(kind="stable")[:count]
    return drawn.index_N[closest], train.index_N[row_N[closest]]


def copying_of_codes(train: KeptFeatures, drawn: KeptFeatures) -> float:
    """How often a sample lies nearer to its nearest training code than a training code to its nearest other one.

    There are no held-out codes: a training code against all the others takes their place. 0.5 is no preference, 1 a
    copy of a code each time.
    """
    apart_T = train.near(1)[:, 0]
    distance_N, _ = nearest(drawn.features_NF, train.features_NF)
    return 1.0 - _share_above(distance_N, apart_T)


def rank_statistic(drawn_N: Float64, held_out_H: Float64) -> float:
    """Z_U of Meehan et al. 2020, Eq. 2: the Mann-Whitney statistic of distances in its standard deviations.

    Negative if samples lie nearer to the training images than held-out images do. Ties count half, and lower the
    deviation as usual (Mann & Whitney 1947; Lehmann 1975).
    """
    n, h = len(drawn_N), len(held_out_H)
    _, ties = np.unique(np.concatenate([drawn_N, held_out_H]), return_counts=True)
    total = float(n + h)
    tied = float((ties.astype(np.float64) ** 3 - ties).sum()) / (total * (total - 1))
    variance = n * h / 12 * (total + 1 - tied)
    return (_share_above(drawn_N, held_out_H) - 0.5) * n * h / variance**0.5 if variance > 0 else 0.0


def _share_above(a_N: Float64, b_H: Float64) -> float:
    """The share of pairs with a > b; equal pairs count half."""
    b_H = np.sort(b_H)
    below_N = np.searchsorted(b_H, a_N, "left") + np.searchsorted(b_H, a_N, "right")
    return float(below_N.sum()) / (2 * len(a_N) * len(b_H))


def _nearest_of(images: KeptFeatures, drawn_NF: Float64) -> tuple[Float64, Int64]:
    return nearest(drawn_NF, images.features_NF)


def _cells(train_TF: Float64, *others: Float64) -> list[Int64]:
    """The cell of each image: clusters of the training images, of at least 5 * IN_A_CELL on average."""
    from sklearn.cluster import KMeans  # a second to import
    from threadpoolctl import threadpool_limits

    count = max(1, min(CELLS, len(train_TF) // (5 * IN_A_CELL)))
    with threadpool_limits(1):
        means = KMeans(count, n_init=1, random_state=0).fit(train_TF)
        return [means.labels_, *(means.predict(images) for images in others)]
