"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

A set is taken for the union of the balls around its images that reach to their k-th nearest neighbour in the set.

Legend: R real images, N samples, F feature dimension, B a block of real images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .distances import distance_blocks
from .tally import KeptFeatures

NEIGHBOURS_OF_RECALL = 3  # Kynkäänniemi et al. 2019, section 3
NEIGHBOURS_OF_COVERAGE = 5  # Naeem et al. 2020, section 3.3


@dataclass(frozen=True)
class Manifold:
    """precision: share of samples in a ball of a real image. recall: share of real images in a ball of a sample.
    density: mean number of balls of real images that a sample lies in, over k. coverage: share of real images whose
    ball has a sample in it.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def compare_manifolds(real: KeptFeatures, drawn: KeptFeatures) -> Manifold:
    """Precision and recall with 3 neighbours, density and coverage with 5, as published.

    The more images, the smaller the balls: sets are cut to equally many images. Sets of five images or fewer have no
    5 neighbours: all the others take their place.

    Raises:
        UserError: fewer than two images in a set, or features of different size.
    """
    count = min(len(real), len(drawn))
    recall_k, coverage_k = (min(k, max(1, count - 1)) for k in (NEIGHBOURS_OF_RECALL, NEIGHBOURS_OF_COVERAGE))
    return manifold(real.first(count), drawn.first(count), recall_k, coverage_k)


def manifold(real: KeptFeatures, drawn: KeptFeatures, recall_k: int, coverage_k: int) -> Manifold:
    """All four, of sets of any size.

    Args:
        recall_k: neighbours of precision and recall. coverage_k: of density and coverage.
    """
    most = max(recall_k, coverage_k)
    real_RF, drawn_NF = real.features_NF, drawn.features_NF
    near_RK, near_NK = real.near(most), drawn.near(recall_k)
    radius_R, wide_R, radius_N = near_RK[:, recall_k - 1], near_RK[:, coverage_k - 1], near_NK[:, -1]
    precise_N, dense = np.zeros(len(drawn_NF), bool), 0
    recalled_R, covered_R = np.empty(len(real_RF), bool), np.empty(len(real_RF), bool)
    for block, distance_BN in distance_blocks(real_RF, drawn_NF):
        precise_N |= (distance_BN <= radius_R[block, None]).any(axis=0)
        recalled_R[block] = (distance_BN <= radius_N).any(axis=1)
        inside_BN = distance_BN <= wide_R[block, None]
        covered_R[block] = inside_BN.any(axis=1)
        dense += int(inside_BN.sum())
    return Manifold(
        precision=float(precise_N.mean()),
        recall=float(recalled_R.mean()),
        density=dense / (coverage_k * len(drawn_NF)),
        coverage=float(covered_R.mean()),
    )
