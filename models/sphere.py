"""The unit sphere or ball that latent codes lie in, and the two ways to get there.

Both give the nearest point. They differ in the last bits and in what they do with codes that have no nearest point,
and the numbers of both are kept: models that are packaged today draw the same bytes for ever, and a run that is
resumed goes the same way.

Legend: B rows of a batch, D latent dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Constraint = Literal["sphere", "ball"]


def project(z_BD: Tensor, constraint: Constraint) -> Tensor:
    """Codes that a network or a sampler made, projected in their own precision; differentiable.

    Zero, which has no nearest point on the sphere, stays zero, and so its gradient stays finite.
    """
    if constraint == "sphere":
        return F.normalize(z_BD, dim=1)
    return z_BD / z_BD.norm(dim=1, keepdim=True).clamp(min=1.0)


def project_rows(z_BD: Tensor, constraint: Constraint, previous_BD: Tensor) -> Tensor:
    """float32 codes of the latent table, moved by an optimiser step, projected; not to be differentiated.

    The norm is taken in float64, where the square of no float32 overflows: a step may be of any size. A code
    without a nearest point (zero, on the sphere) or without a value stays at `previous_BD`: a row must never
    be lost to one bad step.
    """
    norm_B1 = torch.linalg.vector_norm(z_BD, dim=1, keepdim=True, dtype=torch.float64)
    unit_BD = (z_BD / norm_B1).float()
    projected_BD = unit_BD if constraint == "sphere" else torch.where(norm_B1 > 1, unit_BD, z_BD)
    possible_B1 = norm_B1.isfinite() & (norm_B1 > 0) if constraint == "sphere" else norm_B1.isfinite()
    return torch.where(possible_B1, projected_BD, previous_BD)
