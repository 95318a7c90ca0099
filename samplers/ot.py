"""Semi-discrete optimal transport from N(0, I) to the codes, and the map of AE-OT (An et al., ICLR 2020).

Shapes: B batch, D latent dimension (and of the noise), N rows of all workers, n own rows, S points of a step, s own
points, V neighbours, K numbers of a piggyback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..cluster.neighbours import nearest
from ..config.samplers import OtConfig, SamplerConfig
from ..models.comm import all_sum
from ..models.mapping import NoiseToCode
from ..models.sphere import Constraint, project
from .base import Codes, FitStep, Sampler, State
from .gathering import gather_rows
from .transport import Heights, lifted, unlifted

CHUNK_NUMBERS = 1 << 24  # float64 numbers of a chunk of draws against all codes, at most


class TransportMap(NoiseToCode):
    """z = y_i, or a mixture of codes around it, where <e, y_i> + h_i is the largest of all codes y and heights h.

    `none`: y_i itself. `simplex`: the barycentric coordinates of e among the centres of mass of the D + 1 cells of
    the largest values, applied to their codes, where e lies in that simplex; else y_i. `pair`: (1 - share) y_i +
    share y_j with the first neighbour j, in the order of values, whose cell's normal (y_j, -1) makes an angle of at
    most `angle` with (y_i, -1); else y_i. Where the public code of AE-OT leaves a draw without such a neighbour out,
    this map, which gives a code to every noise, returns y_i.

    The number of codes is known when the weights are loaded.
    """

    code: Tensor
    height: Tensor
    centre: Tensor
    count: Tensor

    def __init__(self, config: OtConfig, latent_dim: int, constraint: Constraint) -> None:
        super().__init__()
        self.noise_dim, self.constraint, self.config = latent_dim, constraint, config
        self.resize(0)

    def resize(self, rows: int) -> None:
        """Make room for the codes of `rows` rows."""
        dim = self.noise_dim
        self.register_buffer("code", torch.zeros(rows, dim))
        self.register_buffer("height", torch.zeros(rows))
        if self.config.extension == "simplex":
            self.register_buffer("centre", torch.zeros(rows, dim))
            self.register_buffer("count", torch.zeros(rows))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        height = state_dict.get(f"{prefix}height")
        if isinstance(height, Tensor) and height.ndim == 1 and len(height) != len(self.height):
            with torch.device("meta" if self.height.is_meta else self.height.device):
                self.resize(len(height))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, e_BE: Tensor) -> Tensor:
        size = max(1, CHUNK_NUMBERS // max(1, len(self.height)))
        parts = [self.mixed(e_CE) for e_CE in e_BE.split(size)] if len(e_BE) else [e_BE]
        return project(torch.cat(parts), self.constraint)

    def mixed(self, e_BD: Tensor) -> Tensor:
        """Codes, or mixtures of them, before the projection."""
        rows, dim = self.code.shape
        if self.config.extension == "none":
            return self.code[nearest(unlifted(e_BD), lifted(self.code, self.height))[0]]
        value_BN = e_BD.double() @ self.code.double().T + self.height.double()
        if self.config.extension == "pair":
            return self.pairs(value_BN.topk(min(self.config.neighbours, rows), dim=1).indices)
        if rows <= dim:
            return self.code[value_BN.argmax(1)]
        return self.simplices(e_BD, value_BN.topk(dim + 1, dim=1).indices)

    def pairs(self, index_BV: Tensor) -> Tensor:
        """Mixtures of the first code of each row with a neighbour within the angle."""
        y_BVD = self.code[index_BV]
        dot_BV = (y_BVD[:, :1] * y_BVD).double().sum(2) + 1
        length_BV = (y_BVD.double().square().sum(2) + 1).sqrt()
        angle_BV = (dot_BV / (length_BV[:, :1] * length_BV)).clamp(-1, 1).acos()
        close_BV = angle_BV <= self.config.angle
        close_BV[:, 0] = False
        chosen_B = close_BV.int().argmax(1)  # the first; the code itself where there is none
        other_BD = y_BVD[torch.arange(len(y_BVD), device=y_BVD.device), chosen_B]
        return torch.lerp(y_BVD[:, 0], other_BD, self.config.share)

    def simplices(self, e_BD: Tensor, index_BV: Tensor) -> Tensor:
        """Barycentric mixtures, V = D + 1."""
        c_BVD = self.centre[index_BV].double()
        edges_BDD = (c_BVD[:, 1:] - c_BVD[:, :1]).mT
        rest_BV, bad_B = torch.linalg.solve_ex(edges_BDD, e_BD.double() - c_BVD[:, 0])
        share_BV = torch.cat([1 - rest_BV.sum(1, keepdim=True), rest_BV], dim=1)
        inside_B = (share_BV >= 0).all(1) & share_BV.isfinite().all(1) & (bad_B == 0)
        inside_B &= (self.count[index_BV] > 0).all(1)
        share_BV = torch.where(inside_B[:, None], share_BV, torch.zeros_like(share_BV)).float()
        return torch.where(
            inside_B[:, None], (share_BV[:, None] @ self.code[index_BV])[:, 0], self.code[index_BV[:, 0]]
        )


class OtSampler(Sampler):
    """The fit: Adam on the heights, by fresh points of N(0, I) in every step."""

    title = "Optimal transport"
    network: TransportMap
    config: OtConfig

    def setup(self, state: State | None) -> None:
        self.heights: Heights | None = None
        self.resumed_from = state

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> TransportMap:
        return TransportMap(cast(OtConfig, config), latent_dim, constraint)

    def fit(
        self,
        codes: Codes,
        first_epoch: int,
        piggyback: Callable[[], Tensor],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Iterator[FitStep]:
        """`loss` is the total variation between the shares of the points that fell into the cells and 1 / N each.

        With m points a cell in an epoch, a perfect fit has a loss of about 0.4 / sqrt(m).
        """
        if first_epoch >= self.epochs:
            return
        enter("ot")
        total, config = codes.total, self.config
        self.network.resize(total)
        self.network.to(self.device)
        self.network.code.copy_(gather_rows(codes, np.arange(total), self.device))
        self.heights = Heights(total, self.device, self.resumed_from if first_epoch else None)
        points = max(1, round(config.samples * total))
        counted_N = torch.zeros(total, dtype=torch.float64, device=self.device)
        for epoch in range(first_epoch, self.epochs):
            counted_N.zero_()
            keep = config.extension == "simplex" and epoch == self.epochs - 1
            centre_ND = torch.zeros(total if keep else 0, codes.z_nD.shape[1], dtype=torch.float64, device=self.device)
            for step in range(config.steps):
                lr = config.lr * config.schedule.factor(epoch + step / config.steps, self.epochs)
                x_sD = self.heights.points(self.seed, epoch, range(step * points, (step + 1) * points), codes)
                index_s, count_N, carried_K = self.heights.step(x_sD, codes, lr, float(self.scale()), piggyback())
                counted_N += count_N
                if keep:
                    centre_ND.index_add_(0, index_s, x_sD.double())
                yield FitStep(epoch, step, config.steps, carried_K)
            self.network.height.copy_(self.heights.height_N)
            if keep:
                all_sum(centre_ND)
                self.network.centre.copy_(centre_ND / counted_N.clamp(min=1)[:, None])
                self.network.count.copy_(counted_N)
            loss = float((counted_N / counted_N.sum() - 1 / total).abs().sum()) / 2
            carried_K = all_sum(piggyback().to(self.device)).cpu()
            yield FitStep(epoch, config.steps, config.steps, carried_K, True, {"loss": loss})

    def scale(self) -> Tensor:
        """The size of differences between values <x, y_i>: the spread of the codes."""
        return self.network.code.std(0).norm()

    def state(self) -> State:
        return super().state() | (self.heights.state() if self.heights else self.resumed_from or {})

    @classmethod
    def flops(cls, config: SamplerConfig, latent_dim: int, rows: int) -> float:
        """Compare every point of every step with every code."""
        ot = cast(OtConfig, config)
        return 2.0 * ot.epochs * ot.steps * ot.samples * rows * rows * (latent_dim + 1)

    @classmethod
    def steps(cls, config: SamplerConfig, rows: int) -> int:
        ot = cast(OtConfig, config)
        return ot.epochs * ot.steps


SAMPLER = OtSampler
