"""The Gaussian over latent codes: the sampling of GLO (Bojanowski et al. 2018), and the baseline.

Shapes: B batch, D latent dimension, n rows of this worker, N rows of all workers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.samplers import SamplerConfig
from ..models.comm import all_sum
from ..models.mapping import NoiseToCode
from ..models.sphere import Constraint, project
from .base import Codes
from .closed_form import ClosedForm

CHUNK = 65536


class Gaussian(NoiseToCode):
    """z = mean + root g for g ~ N(0, I_D), projected to the sphere or ball; root root^T is the covariance."""

    mean: Tensor
    root: Tensor

    def __init__(self, latent_dim: int, constraint: Constraint) -> None:
        super().__init__()
        self.noise_dim, self.constraint = latent_dim, constraint
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("root", torch.eye(latent_dim))

    def forward(self, e_BE: Tensor) -> Tensor:
        return project(self.mean + e_BE @ self.root.T, self.constraint)


class GaussianSampler(ClosedForm):
    """The fit: mean and covariance."""

    title = "Gaussian"

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> Gaussian:
        return Gaussian(latent_dim, constraint)

    def solve(self, codes: Codes) -> float:
        """Returns the trace of the covariance."""
        fitted = gaussian(codes.z_nD, codes.total, self.device)
        self.network.load_state_dict(fitted)
        return float(fitted["root"].square().sum())


def gaussian(z_nD: Tensor, total: int | None = None, device: torch.device | None = None) -> dict[str, Tensor]:
    """Mean [D] and root [D, D] (root @ root.T is the covariance) of codes, accumulated in float64.

    The symmetric root also exists for fewer codes than dimensions, where a Cholesky factor does not.

    Args:
        total: N, if `z_nD` holds this worker's rows only; then all workers must call, and get the same result.
        device: device of the all-reduce.
    """

    def shared(local: Tensor) -> Tensor:
        return local if total is None else all_sum(local.to(device)).cpu()

    count, dim = total or len(z_nD), z_nD.shape[1]
    sum_D = sum((chunk.double().sum(0) for chunk in z_nD.split(CHUNK)), torch.zeros(dim, dtype=torch.float64))
    mean_D = shared(sum_D) / count
    scatter_DD = torch.zeros(dim, dim, dtype=torch.float64)
    for chunk_BD in z_nD.split(CHUNK):
        centred_BD = chunk_BD.double() - mean_D
        scatter_DD += centred_BD.T @ centred_BD
    return of_moments(count, mean_D, shared(scatter_DD))


def of_moments(count: int, mean_D: Tensor, scatter_DD: Tensor) -> dict[str, Tensor]:
    """Mean and root from the number of codes, their mean and their centred sum of squares, in float64."""
    value_D, vector_DD = torch.linalg.eigh(scatter_DD / max(count - 1, 1))
    root_DD = (vector_DD * value_D.clamp(min=0).sqrt()) @ vector_DD.T
    return {"mean": mean_D.float(), "root": root_DD.float()}


SAMPLER = GaussianSampler
