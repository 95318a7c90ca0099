"""What a budget of random trials buys: the best of k of them, as a distribution (Lucic et al. 2018, figure 3).

The trials of a random search are exchangeable, so the n that were made say exactly how good the best of any k of them
is: of all C(n, k) choices of k, the share whose best is the i-th best trial is C(n - i, k - 1) / C(n, k), i = 1 ... n.

Legend: n trials, k of them (rows K), quantiles Q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FEWEST = 5  # trials below which a curve says nothing


def best_of_k_KQ(values: Sequence[float], quantiles: Sequence[float], minimize: bool) -> NDArray[np.float64]:
    """Quantiles of the best of k = 1 ... n trials that are drawn without replacement.

    Args:
        values: of the n trials; infinite (in the worse direction) for one that failed.
        quantiles: in (0, 1), from the best outcome to the worst: 0.1 is what one draw of k in ten gets or betters.
    Returns:
        Values in the unit of `values`, one row per k; infinite where so many draws have failed trials alone.
    """
    n = len(values)
    ranked_n = np.sort(np.asarray(values, dtype=np.float64) * (1 if minimize else -1))
    found_KQ = np.empty((n, len(quantiles)))
    for k in range(1, n + 1):
        # share_n[i]: of the draws of k whose best is among the i + 1 best; exact in integers, so no row sums to 1.1
        of_all = math.comb(n, k)
        share_n = np.array([1 - math.comb(n - i, k) / of_all for i in range(1, n + 1)])
        at_Q = np.searchsorted(share_n, np.asarray(quantiles) - 1e-12)
        found_KQ[k - 1] = ranked_n[np.minimum(at_Q, n - 1)]
    return found_KQ if minimize else -found_KQ
