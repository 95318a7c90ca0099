"""Flow matching over the codes: a velocity field that carries noise to codes (Lipman et al., ICLR 2023).

Shapes: B own rows of a batch, T all rows of it, D latent dimension (and of the noise), N rows of all workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..cluster.placement import ranges
from ..config.samplers import CosineScheduleConfig, FlowConfig, SamplerConfig
from ..models.comm import all_sum, rank, world_size
from ..models.noise import noise, uniform
from ..models.sphere import Constraint
from ..models.velocity import VelocityFlow
from .adam import AdamSampler, Batch
from .base import Codes, State
from .transport import Heights

HEIGHTS_EPOCH = 2**31  # of the noise that the heights are found with: no epoch of the training


class FlowSampler(AdamSampler):
    """The fit of u to |u(x_t, t, t) - (z - e)|^2 with x_t = (1 - t) e + t z, over pairs (e, z) of a coupling.

    Couplings. independent: the noise of a code is any. minibatch: within a batch, noise and codes are paired by the
    exact assignment of least squared distance (Pooladian et al. 2023; Tong et al. 2024). semidiscrete: each noise goes
    to the code of its cell of the optimal transport to all codes (`transport.py`).

    `velocity: mean` fits u(x_t, t, s), the mean velocity from t to s, to v + (s - t) d/dt u(x_t, t, s), where v = z - e
    and d/dt, the total derivative along the path, is a Jacobian-vector product; no gradient flows through the target.
    This is the identity of MeanFlow (Geng et al. 2025) with time running from noise to data.
    """

    title = "Flow matching"
    config: FlowConfig
    network: VelocityFlow

    def setup(self, state: State | None) -> None:
        super().setup(state)
        self.height_N: Tensor | None = None if state is None else state.get("heights", {}).get("height")
        self.cell_N: np.ndarray | None = None

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> VelocityFlow:
        keys = cast(FlowConfig, config)
        mean = keys.velocity == "mean"
        return VelocityFlow(latent_dim, keys.hidden_dim, keys.depth, keys.activation, keys.steps, mean, constraint)

    def prepare(self, codes: Codes, enter: Callable[[str], None]) -> None:
        """Find the heights of the semi-discrete coupling, once a run."""
        if self.config.coupling != "semidiscrete":
            return
        self.heights = Heights(codes.total, self.device)
        if self.height_N is None:
            enter("transport")
            self.height_N = find_heights(self.heights, self.config, self.seed, codes, float(self.network.scale))
        with torch.no_grad():
            self.heights.height_N.copy_(self.height_N)

    def begin_epoch(self, epoch: int, codes: Codes) -> None:
        """Find the cells of the epoch's noise, which has one point for each row."""
        if self.config.coupling != "semidiscrete":
            return
        x_sD = self.heights.points(self.seed, epoch, range(codes.total), codes)
        mine = ranges(codes.total, world_size())[rank()]
        cell_N = torch.zeros(codes.total, dtype=torch.float64, device=self.device)
        cell_N[mine.start : mine.stop] = self.heights.cells(x_sD, codes).double()
        self.cell_N = all_sum(cell_N).long().cpu().numpy()

    def targets(self, index_T: np.ndarray, codes: Codes) -> tuple[Tensor, Tensor]:
        """As the base, but that the semi-discrete coupling numbers a batch by noise: codes are the cells."""
        return super().targets(index_T if self.cell_N is None else self.cell_N[index_T], codes)

    def loss(self, batch: Batch) -> Tensor:
        x1_BD, dim = batch.z_BD, batch.z_BD.shape[1]
        e_BE = noise(self.seed, batch.epoch, batch.index_B, dim + 4, self.device)  # the numbers after D choose times
        x0_BD, chance_B4 = e_BE[:, :dim], uniform(e_BE[:, dim:]).float()
        if self.config.coupling == "minibatch":
            x0_BD = assigned_noise(batch, noise(self.seed, batch.epoch, batch.index_T, dim, self.device))
        t_B = chance_B4[:, 0]
        v_BD = x1_BD - x0_BD
        x_BD = x0_BD + t_B[:, None] * v_BD
        if self.config.velocity == "instant":
            return (self.network.velocity(x_BD, t_B, t_B) - v_BD).square().mean(1)
        t_B, s_B = chance_B4[:, :2].amin(1), chance_B4[:, :2].amax(1)
        s_B = torch.where(chance_B4[:, 2] < 0.5, t_B, s_B)  # half of the rows learn the velocity itself
        x_BD = x0_BD + t_B[:, None] * v_BD
        one_B = torch.ones_like(t_B)
        u_BD, slope_BD, *_ = torch.func.jvp(
            self.network.velocity, (x_BD, t_B, s_B), (v_BD, one_B, torch.zeros_like(one_B))
        )
        target_BD = (v_BD + (s_B - t_B)[:, None] * slope_BD).detach()
        return (u_BD - target_BD).square().mean(1)

    def state(self) -> State:
        held = {} if self.height_N is None else {"heights": {"height": self.height_N.detach().cpu().clone()}}
        return super().state() | held


def find_heights(heights: Heights, config: FlowConfig, seed: int, codes: Codes, scale: float) -> Tensor:
    """The heights of the transport from N(0, I) to all codes. Collective."""
    keys, schedule = config.heights, CosineScheduleConfig()
    points = max(1, round(keys.samples * codes.total))
    for step in range(keys.steps):
        x_sD = heights.points(seed, HEIGHTS_EPOCH, range(step * points, (step + 1) * points), codes)
        heights.step(x_sD, codes, keys.lr * schedule.factor(step / keys.steps, 1), scale, torch.zeros(0))
    return heights.height_N.detach().clone()


def assigned_noise(batch: Batch, e_TD: Tensor) -> Tensor:
    """The noise of each own code, by the exact assignment of the whole batch. Collective."""
    z_TD = torch.zeros_like(e_TD)
    z_TD[batch.own_B.to(e_TD.device)] = batch.z_BD
    all_sum(z_TD)  # exact: every row is one worker's, and the others add zeros
    cost_TT = torch.cdist(z_TD.double(), e_TD.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    partner_T = linear_sum_assignment(cost_TT.cpu().numpy())[1]
    return e_TD[torch.as_tensor(partner_T[batch.own_B.numpy()], device=e_TD.device)]


SAMPLER = FlowSampler
