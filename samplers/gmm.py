"""A mixture of Gaussians over the codes, fitted by expectation maximisation (Dempster, Laird & Rubin 1977).

Shapes: B batch, D latent dimension, E = D + 1 noise dimension, K components, n rows of this worker, N rows of all
workers, S rows that the start is taken from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from ..config.samplers import GmmConfig, SamplerConfig
from ..errors import UserError
from ..models.comm import all_sum, broadcast
from ..models.mapping import NoiseToCode
from ..models.noise import uniform
from ..models.sphere import Constraint, project
from .base import Codes, FitStep, Sampler
from .gathering import gather_rows, shuffled_rows
from .gaussian import gaussian

CHUNK_NUMBERS = 1 << 24  # float64 numbers of a chunk of rows, at most
START_ROWS = 50  # of the start, for each component


class Mixture(NoiseToCode):
    """z = mean_k + root_k g: e_0 chooses the component k, the other numbers of e are g.

    Component k has the quantiles of N(0, 1) between the sums of the weights before it and with it.
    """

    weight: Tensor
    mean: Tensor
    root: Tensor

    def __init__(self, latent_dim: int, components: int, constraint: Constraint) -> None:
        super().__init__()
        self.noise_dim, self.constraint = latent_dim + 1, constraint
        self.register_buffer("weight", torch.full((components,), 1 / components))
        self.register_buffer("mean", torch.zeros(components, latent_dim))
        self.register_buffer("root", torch.eye(latent_dim).repeat(components, 1, 1))

    def forward(self, e_BE: Tensor) -> Tensor:
        edge_K = self.weight.double().cumsum(0)
        component_B = torch.searchsorted(edge_K / edge_K[-1], uniform(e_BE[:, 0])).clamp(max=len(edge_K) - 1)
        g_BD = e_BE[:, 1:]
        z_BD = self.mean[component_B] + (self.root[component_B] @ g_BD[:, :, None])[:, :, 0]
        return project(z_BD, self.constraint)

    def log_joint(self, z_BD: Tensor) -> Tensor:
        """log weight_k N(z; mean_k, root_k root_k^T), float64 [B, K]."""
        root_KDD, dim = self.root.double(), self.mean.shape[1]
        centred_KBD = z_BD.double()[None] - self.mean.double()[:, None]
        white_KDB = torch.linalg.solve_triangular(root_KDD, centred_KBD.mT, upper=False)
        log_root_K = root_KDD.diagonal(dim1=1, dim2=2).log().sum(1)
        constant_K = self.weight.double().log() - log_root_K - 0.5 * dim * torch.tensor(2 * torch.pi).double().log()
        return constant_K - 0.5 * white_KDB.square().sum(1).T


class GmmSampler(Sampler):
    """The fit: an epoch is one step, expectation and maximisation over all rows."""

    title = "Gaussian mixture"
    network: Mixture
    config: GmmConfig

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> Mixture:
        return Mixture(latent_dim, cast(GmmConfig, config).components, constraint)

    def fit(
        self,
        codes: Codes,
        first_epoch: int,
        piggyback: Callable[[], Tensor],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Iterator[FitStep]:
        """`loss` is the mean negative log-likelihood of a code, in nats, before the step."""
        enter("gmm")
        z_nD = codes.z_nD.to(self.device)
        root_DD = gaussian(codes.z_nD, codes.total, self.device)["root"].to(self.device).double()
        variance_DD = root_DD @ root_DD.T
        floor = self.config.floor * max(float(variance_DD.trace()) / len(variance_DD), 1e-12)
        if first_epoch == 0:
            self.start(codes, floor)
        for epoch in range(first_epoch, self.config.epochs):
            moments = expectation(self.network, z_nD)
            flat = torch.cat([*(moment.flatten() for moment in moments), piggyback().to(self.device).double()])
            all_sum(flat)
            sums = flat.split([*(moment.numel() for moment in moments), len(flat) - sum(m.numel() for m in moments)])
            nll, mass_K, sum_KD, scatter_KDD = (
                part.view(moment.shape) for part, moment in zip(sums, moments, strict=False)
            )
            maximise(self.network, mass_K, sum_KD, scatter_KDD, floor)
            yield FitStep(epoch, 0, 1, sums[-1].float().cpu(), True, {"loss": float(nll) / codes.total})

    def start(self, codes: Codes, floor: float) -> None:
        """Centres of k-means on a sample of the rows, with the pooled variance around them."""
        from sklearn.cluster import KMeans

        count = self.config.components
        if count > codes.total:
            raise UserError(f"sampler.components={count} is more than the {codes.total} codes; lower it")
        rows_S = shuffled_rows(self.seed, codes.total)[: START_ROWS * count]
        z_SD = gather_rows(codes, rows_S, self.device).cpu().double().numpy()
        found = KMeans(count, n_init=1, random_state=self.seed).fit(z_SD)
        spread = found.inertia_ / z_SD.size + floor
        with torch.no_grad():
            self.network.mean.copy_(torch.from_numpy(found.cluster_centers_))
            self.network.root.copy_(spread**0.5 * torch.eye(z_SD.shape[1]))
            self.network.weight.fill_(1 / count)
            for buffer in self.network.buffers():
                broadcast(buffer)  # machines may round differently

    @classmethod
    def flops(cls, config: SamplerConfig, latent_dim: int, rows: int) -> float:
        """Per epoch: one triangular solve and one outer product of every code and component."""
        gmm = cast(GmmConfig, config)
        return 3.0 * gmm.epochs * rows * gmm.components * latent_dim**2

    @classmethod
    def steps(cls, config: SamplerConfig, rows: int) -> int:
        return cast(GmmConfig, config).epochs


@torch.no_grad()
def expectation(network: Mixture, z_nD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moments of this worker's codes under their responsibilities, float64.

    Returns:
        The negative log-likelihood [], and by component the mass [K], and the sum [K, D] and scatter [K, D, D] of
        the codes around the current mean: around another point the covariance would be a difference of large numbers.
    """
    count, dim = network.mean.shape
    nll, mass_K = z_nD.new_zeros((), dtype=torch.float64), z_nD.new_zeros(count, dtype=torch.float64)
    sum_KD = z_nD.new_zeros(count, dim, dtype=torch.float64)
    scatter_KDD = z_nD.new_zeros(count, dim, dim, dtype=torch.float64)
    for z_BD in z_nD.split(max(1, CHUNK_NUMBERS // (count * dim))):
        joint_BK = network.log_joint(z_BD)
        total_B = joint_BK.logsumexp(1)
        share_KB = (joint_BK - total_B[:, None]).exp().T
        centred_KBD = z_BD.double()[None] - network.mean.double()[:, None]
        nll -= total_B.sum()
        mass_K += share_KB.sum(1)
        weighted_KBD = share_KB[:, :, None] * centred_KBD
        sum_KD += weighted_KBD.sum(1)
        scatter_KDD += weighted_KBD.mT @ centred_KBD
    return nll, mass_K, sum_KD, scatter_KDD


@torch.no_grad()
def maximise(network: Mixture, mass_K: Tensor, sum_KD: Tensor, scatter_KDD: Tensor, floor: float) -> None:
    """Set weights, means and roots to those of the moments; a component without mass keeps its mean."""
    held_K = mass_K.clamp(min=1e-9)
    moved_KD = sum_KD / held_K[:, None]
    covariance_KDD = scatter_KDD / held_K[:, None, None] - moved_KD[:, :, None] * moved_KD[:, None, :]
    covariance_KDD.diagonal(dim1=1, dim2=2).clamp_(min=0).add_(floor)
    network.weight.copy_(held_K / held_K.sum())
    network.mean.add_(moved_KD.to(network.mean.dtype))
    network.root.copy_(torch.linalg.cholesky(covariance_KDD))


SAMPLER = GmmSampler
