"""Precision and recall of distributions (Sajjadi et al. 2018), their curve, F8 and F1/8.

Legend: K clusters, A angles, F feature dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .distances import Float64
from .tally import KeptFeatures

CLUSTERS, RUNS, ANGLES = 20, 10, 1001  # as published
BETA = 8.0


@dataclass(frozen=True, eq=False)
class PrdCurve:
    """Precision and recall at every trade-off between them, from all recall to all precision; [A] each."""

    precision_A: Float64
    recall_A: Float64

    @property
    def f8(self) -> float:
        """The largest F-score that weighs recall 8 times as much as precision: how much of the data is there."""
        return self._largest(BETA)

    @property
    def f1_8(self) -> float:
        """The largest F-score that weighs precision 8 times as much as recall: how good the samples are."""
        return self._largest(1 / BETA)

    def _largest(self, beta: float) -> float:
        precision_A, recall_A, weight = self.precision_A, self.recall_A, beta * beta
        below_A = weight * precision_A + recall_A
        score_A = (1 + weight) * precision_A * recall_A / np.where(below_A > 0, below_A, 1.0)
        return float(score_A.max())


def prd_curve(real_K: Float64, drawn_K: Float64, angles: int = ANGLES) -> PrdCurve:
    """The curve of two histograms, Sajjadi et al. 2018, section 3.3.

    precision = sum min(l real, drawn), recall = precision / l, at slopes l = tan(angle), equally spaced angles.

    Args:
        real_K, drawn_K: shares of the modes; each sums to 1.
    """
    epsilon = 1e-10
    slope_A = np.tan(np.linspace(epsilon, np.pi / 2 - epsilon, angles))
    precision_A = np.minimum(slope_A[:, None] * real_K, drawn_K).sum(axis=1)
    return PrdCurve(precision_A.clip(0, 1), (precision_A / slope_A).clip(0, 1))


def compare_distributions(real: KeptFeatures, drawn: KeptFeatures) -> PrdCurve:
    """The mean curve over 10 clusterings of both sets together into 20 modes.

    The sets are cut to equally many images, as published. Clusterings are seeded: equal features give equal curves.

    Raises:
        UserError: fewer images than clusters, or features of different size.
    """
    count = min(len(real), len(drawn))
    real_NF, drawn_NF = real.first(count).features_NF, drawn.first(count).features_NF
    if real_NF.shape[1] != drawn_NF.shape[1]:
        raise UserError("features of different size cannot be compared; use one extractor for both")
    if 2 * count < CLUSTERS:
        raise UserError(f"{2 * count} images cannot be put into {CLUSTERS} clusters; draw more samples")
    curves = [prd_curve(*_histograms(real_NF, drawn_NF, run)) for run in range(RUNS)]
    return PrdCurve(
        np.mean([curve.precision_A for curve in curves], axis=0), np.mean([curve.recall_A for curve in curves], axis=0)
    )


def _histograms(real_NF: Float64, drawn_NF: Float64, seed: int) -> tuple[Float64, Float64]:
    """Shares of the clusters in each set."""
    from sklearn.cluster import MiniBatchKMeans  # a second to import
    from threadpoolctl import threadpool_limits

    both_NF = np.concatenate([real_NF, drawn_NF]).astype(np.float32)
    with threadpool_limits(1):  # batches are small: on a busy machine threads would wait longer than they compute
        label_N = MiniBatchKMeans(CLUSTERS, n_init=10, random_state=seed).fit(both_NF).labels_
    halves = label_N[: len(real_NF)], label_N[len(real_NF) :]
    shares = [np.bincount(half_N, minlength=CLUSTERS) / len(half_N) for half_N in halves]
    return shares[0], shares[1]
