"""Projections of latent codes to the unit sphere or ball, or to nothing: codes of an encoder lie anywhere.

Both functions give the nearest point. They differ in the last bits, and for codes without a nearest point; both
are kept as they are, so that packaged models draw the same bytes and resumed runs continue identically.

Legend: B rows of a batch, D latent dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Constraint = Literal["sphere", "ball", "none"]


def project(z_BD: Tensor, constraint: Constraint) -> Tensor:
    """Project codes of a network or a sampler, in their own precision; differentiable.

    Zero, which has no nearest point on the sphere, stays zero, so that its gradient is finite.
    """
    if constraint == "sphere":
        return F.normalize(z_BD, dim=1)
    if constraint == "none":
        return z_BD
    return z_BD / z_BD.norm(dim=1, keepdim=True).clamp(min=1.0)


def project_rows(z_BD: Tensor, constraint: Constraint, previous_BD: Tensor) -> Tensor:
    """Project float32 codes of the latent table after an optimiser step; not differentiable.

    The norm is computed in float64, where the squares of float32 cannot overflow. A code without a nearest
    point (zero, on the sphere) or with non-finite values is reset to `previous_BD`, so that a bad step does not
    destroy a row.
    """
    if constraint == "none":
        return torch.where(z_BD.isfinite().all(1, keepdim=True), z_BD, previous_BD)
    norm_B1 = torch.linalg.vector_norm(z_BD, dim=1, keepdim=True, dtype=torch.float64)
    unit_BD = (z_BD / norm_B1).float()
    projected_BD = unit_BD if constraint == "sphere" else torch.where(norm_B1 > 1, unit_BD, z_BD)
    possible_B1 = norm_B1.isfinite() & (norm_B1 > 0) if constraint == "sphere" else norm_B1.isfinite()
    return torch.where(possible_B1, projected_BD, previous_BD)
