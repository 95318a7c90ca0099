"""Equal rows of a float32 table, in the time of one pass and one sort.

Legend: M rows, D dimension, R rows that share a hash with an earlier row, U distinct rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1 << 12  # at a time: what they take stays in the cache


def distinct_rows(x_MD: Tensor) -> Tensor:
    """The first of every set of equal rows: their positions, int64 [U], ascending.

    A row is found by a hash, and left out only if all its numbers equal those of an earlier row. Where unequal rows
    share a hash, which is rare, equal ones may be kept: then the search does more work and finds the same.
    """
    seeded = torch.Generator().manual_seed(0)  # weights without a pattern: sums of multiples k w would often be equal
    weight_D = torch.randint(-(2**62), 2**62, (x_MD.shape[1],), generator=seeded).mul_(2).add_(1).to(x_MD.device)
    hash_M, order_M = torch.cat([_hash(part_MD, weight_D) for part_MD in x_MD.split(_ROWS)]).sort(stable=True)
    again_M = torch.zeros_like(hash_M, dtype=torch.bool)
    again_M[1:] = hash_M[1:] == hash_M[:-1]
    kept_M = torch.ones_like(again_M)
    at_R = again_M.nonzero()[:, 0]
    first_M = torch.where(again_M, 0, torch.arange(len(hash_M), device=x_MD.device)).cummax(0).values
    for at_r in at_R.split(_ROWS):
        row_r, first_r = order_M[at_r], order_M[first_M[at_r]]
        kept_M[row_r] = (x_MD[row_r] != x_MD[first_r]).any(dim=1)
    return kept_M.nonzero()[:, 0]


def _hash(x_MD: Tensor, weight_D: Tensor) -> Tensor:
    """A 64-bit hash of every row, by its bits; -0 counts as 0, to which it is equal."""
    return ((x_MD + 0.0).view(torch.int32) * weight_D).sum(dim=1)
