"""Rows of other workers, where a sampler needs some or all of the codes on every worker.

Shapes: D latent dimension, S rows asked for, N rows of all workers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..cluster.placement import global_batches
from ..models.comm import all_sum
from .base import Codes


def gather_rows(codes: Codes, rows_S: np.ndarray, device: torch.device) -> Tensor:
    """Collective: the codes [S, D] of rows of any worker, bit for bit (a sum with zeros is exact)."""
    z_SD = torch.zeros(len(rows_S), codes.z_nD.shape[1], device=device)
    mine_S = (rows_S >= codes.rows.start) & (rows_S < codes.rows.stop)
    own = torch.as_tensor(rows_S[mine_S] - codes.rows.start, device=codes.z_nD.device)
    z_SD[torch.as_tensor(np.flatnonzero(mine_S), device=device)] = codes.z_nD[own].to(device)
    return all_sum(z_SD)


def gather_array(own_n: Tensor, codes: Codes) -> Tensor:
    """Collective: one number of every row [N], from those of each worker's rows."""
    all_N = torch.zeros(codes.total, dtype=own_n.dtype, device=own_n.device)
    all_N[codes.rows.start : codes.rows.stop] = own_n
    return all_sum(all_N)


def shuffled_rows(seed: int, total: int) -> np.ndarray:
    """All rows in an order that depends on the seed only."""
    return global_batches(seed, 0, total, total)[0]
