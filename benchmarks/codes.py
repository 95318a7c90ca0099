"""Synthetic codes for the benchmarks of samplers."""

from __future__ import annotations

import torch
from glann.metrics.tally import KeptFeatures
from torch import Tensor
from torch.nn.functional import normalize

GROUPS = 20


def synthetic(rows: int, dim: int) -> Tensor:
    """Unit codes in groups of a few directions each, as those of a trained stage 1 are."""
    generator = torch.Generator().manual_seed(0)
    centre_KD = torch.randn(GROUPS, dim, generator=generator)
    axes_KDD = torch.randn(GROUPS, dim, dim, generator=generator) / (4 * dim**0.5)
    axes_KDD *= 0.8 ** torch.arange(dim)
    own_N = torch.randint(GROUPS, (rows,), generator=generator)
    spread_ND = (axes_KDD[own_N] @ torch.randn(rows, dim, 1, generator=generator) * dim**0.5)[..., 0]
    return normalize(centre_KD[own_N] + spread_ND, dim=1)


def kept(z_ND: Tensor) -> KeptFeatures:
    return KeptFeatures().update(z_ND, torch.arange(len(z_ND)))
