"""Distances between all pairs of feature vectors, in float64, block by block.

Legend: N, M feature vectors, F their dimension, B those of a block, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Float64 = NDArray[np.float64]

BLOCK_BYTES = 64 << 20  # of one block of distances
# |x|^2 + |y|^2 - 2 x.y has lost half of its digits where the distance is this share of the norms: such pairs are nearly
# copies, few, and computed from their differences.
CANCELLED = 1e-8


def distance_blocks(x_NF: Float64, y_MF: Float64) -> Iterator[tuple[slice, Float64]]:
    """Yield (rows of x, Euclidean distances [B, M]), the relative error of each distance below 1e-7.

    Raises:
        UserError: features of different size.
    """
    if x_NF.shape[1] != y_MF.shape[1]:
        raise UserError(
            f"features of {x_NF.shape[1]} and of {y_MF.shape[1]} numbers cannot be compared; use one extractor for both"
        )
    centre_F = y_MF.mean(axis=0)  # smaller norms, less cancellation
    x_NF, y_MF = x_NF - centre_F, y_MF - centre_F
    square_N, square_M = np.einsum("nf,nf->n", x_NF, x_NF), np.einsum("mf,mf->m", y_MF, y_MF)
    rows = max(1, BLOCK_BYTES // (8 * max(1, len(y_MF))))
    for start in range(0, len(x_NF), rows):
        block = slice(start, min(start + rows, len(x_NF)))
        norms_BM = square_N[block, None] + square_M
        square_BM = x_NF[block] @ y_MF.T
        square_BM *= -2.0
        square_BM += norms_BM
        row_P, column_P = np.nonzero(square_BM <= CANCELLED * norms_BM)
        for part in np.array_split(np.arange(len(row_P)), max(1, len(row_P) // 4096)):
            difference_PF = x_NF[start + row_P[part]] - y_MF[column_P[part]]
            square_BM[row_P[part], column_P[part]] = np.einsum("pf,pf->p", difference_PF, difference_PF)
        yield block, np.sqrt(square_BM)


def others_blocks(x_NF: Float64) -> Iterator[tuple[slice, Float64]]:
    """`distance_blocks` of a set to itself, with infinity for the distance of a vector to itself."""
    for block, distance_BN in distance_blocks(x_NF, x_NF):
        distance_BN[np.arange(len(distance_BN)), np.arange(block.start, block.stop)] = np.inf
        yield block, distance_BN


def neighbour_distances(x_NF: Float64, count: int) -> Float64:
    """Distances of each vector to its `count` nearest others, ascending, [N, K].

    Raises:
        UserError: too few vectors.
    """
    if len(x_NF) <= count:
        raise UserError(f"{len(x_NF)} images have no {count} nearest neighbours each; use at least {count + 1}")
    nearest_NK = np.empty((len(x_NF), count))
    for block, distance_BN in others_blocks(x_NF):
        nearest_NK[block] = np.sort(np.partition(distance_BN, count - 1, axis=1)[:, :count], axis=1)
    return nearest_NK


def nearest(x_NF: Float64, y_MF: Float64) -> tuple[Float64, NDArray[np.int64]]:
    """The distance of each x to its nearest y, and the row of that y; the lowest row where several are as near."""
    distance_N, row_N = np.empty(len(x_NF)), np.empty(len(x_NF), np.int64)
    for block, distance_BM in distance_blocks(x_NF, y_MF):
        row_N[block] = distance_BM.argmin(axis=1)
        distance_N[block] = distance_BM[np.arange(len(distance_BM)), row_N[block]]
    return distance_N, row_N
