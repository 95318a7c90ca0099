"""The Gaussian over latent codes: GLO's own way of sampling (Bojanowski et al. 2018), the baseline."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 65536


def gaussian(z_ND: Tensor) -> dict[str, Tensor]:
    """Mean [D] and root [D, D] (root @ root.T is the covariance) of codes, summed in float64.

    The symmetric root exists also where there are fewer codes than dimensions, a Cholesky factor does not.
    """
    count, dim = z_ND.shape
    mean_D = sum((chunk.double().sum(0) for chunk in z_ND.split(CHUNK)), torch.zeros(dim, dtype=torch.float64)) / count
    scatter_DD = torch.zeros(dim, dim, dtype=torch.float64)
    for chunk_BD in z_ND.split(CHUNK):
        centred_BD = chunk_BD.double() - mean_D
        scatter_DD += centred_BD.T @ centred_BD
    value_D, vector_DD = torch.linalg.eigh(scatter_DD / max(count - 1, 1))
    root_DD = (vector_DD * value_D.clamp(min=0).sqrt()) @ vector_DD.T
    return {"mean": mean_D.float(), "root": root_DD.float()}
