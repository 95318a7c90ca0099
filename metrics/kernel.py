"""Kernel Inception Distance (Binkowski et al. 2018), of any extractor's features.

Legend: N, M images, F feature dimension, B a block.
"""

from __future__ import annotations

from math import fsum

import numpy as np

from ..errors import UserError
from .distances import Float64
from .tally import KeptFeatures

BLOCK = 1024


def kernel_distance(real: KeptFeatures, drawn: KeptFeatures) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel (x.y / F + 1)^3, over all kept images.

    Published values are means over blocks of 1,000 images; this is the same quantity, without the noise of the choice
    of blocks. It is negative where the sets are more alike than two samples of one distribution usually are.

    Raises:
        UserError: fewer than two images in a set, or features of different size.
    """
    x_NF, y_MF = real.features_NF, drawn.features_NF
    if x_NF.shape[1] != y_MF.shape[1]:
        raise UserError(
            f"features of {x_NF.shape[1]} and of {y_MF.shape[1]} numbers cannot be compared; use one extractor for both"
        )
    if min(len(x_NF), len(y_MF)) < 2:
        raise UserError("a kernel distance needs at least 2 images on each side")
    between = _kernel_sum(x_NF, y_MF) / (len(x_NF) * len(y_MF))
    return _mean_of_others(x_NF) + _mean_of_others(y_MF) - 2 * between


def _mean_of_others(x_NF: Float64) -> float:
    """The mean kernel of different images of one set."""
    with_themselves = float(((np.einsum("nf,nf->n", x_NF, x_NF) / x_NF.shape[1] + 1) ** 3).sum())
    return (_kernel_sum(x_NF, x_NF) - with_themselves) / (len(x_NF) * (len(x_NF) - 1))


def _kernel_sum(x_NF: Float64, y_MF: Float64) -> float:
    sums = []
    for start in range(0, len(x_NF), BLOCK):
        kernel_BM = x_NF[start : start + BLOCK] @ y_MF.T
        kernel_BM /= x_NF.shape[1]
        kernel_BM += 1
        sums.append(float((kernel_BM * kernel_BM * kernel_BM).sum()))
    return fsum(sums)
