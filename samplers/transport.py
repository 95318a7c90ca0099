"""Heights of semi-discrete optimal transport, and the cells that they cut noise into.

The transport from a density to N codes y_i of mass 1/N each, at the cost |x - y|^2 / 2, sends x to the code of the
largest <x, y_i> + h_i, where the heights h minimise the convex

    E(h) = E_x max_i (<x, y_i> + h_i) - mean(h),    dE/dh_i = P(x falls into cell i) - 1/N

(Aurenhammer, Hoffmann & Aronov 1998; Gu, Luo, Sun & Yau 2016). The largest value is a nearest neighbour among points of
one more dimension, the lift: |(x, 0) - (y_i, t_i)|^2 = |x|^2 + C - 2 (<x, y_i> + h_i) for t_i^2 = C - |y_i|^2 - 2 h_i.
So the exact sharded search of `cluster.neighbours` finds the cells.

Shapes: D latent dimension, N rows of all workers, n own rows, S points of a step, s own points, K numbers of a
piggyback.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cluster.neighbours import ring_nearest
from ..cluster.placement import ranges
from ..models.comm import all_sum, gather, rank, world_size
from ..models.noise import noise
from .base import Codes, State


class Heights:
    """Heights height_N, the same on every worker, and their Adam optimiser."""

    def __init__(self, total: int, device: torch.device, state: State | None = None) -> None:
        self.height_N = torch.zeros(total, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.height_N], betas=(0.9, 0.99))
        if state is not None:
            with torch.no_grad():
                self.height_N.copy_(state["weights"]["height"])
            self.optimizer.state[self.height_N] = {
                "step": torch.tensor(float(state["updates"])),
                "exp_avg": state["exp_avg"]["height"].to(device).clone(),
                "exp_avg_sq": state["exp_avg_sq"]["height"].to(device).clone(),
            }

    def points(self, seed: int, epoch: int, index: range, codes: Codes) -> Tensor:
        """This worker's share x_sD of the points of N(0, I) with these indices."""
        mine = ranges(len(index), world_size())[rank()]
        index_s = torch.arange(index.start + mine.start, index.start + mine.stop)
        return noise(seed, epoch, index_s, codes.z_nD.shape[1], self.height_N.device)

    @torch.no_grad()
    def step(
        self, x_sD: Tensor, codes: Codes, lr: float, scale: float, piggyback_K: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step on the points of all workers. Collective.

        Args:
            scale: unit of the heights; `lr` is in this unit.
        Returns:
            The cell of each own point, the points of all workers in each cell (float64), the sum of the piggybacks.
        """
        total = len(self.height_N)
        index_s = self.cells(x_sD, codes)
        counted_N = torch.bincount(index_s, minlength=total).double()
        flat = all_sum(torch.cat([counted_N, piggyback_K.to(counted_N)]))
        counted_N, carried_K = flat[:total], flat[total:]
        # in units of 1/N, which Adam does not see, so that its epsilon is small beside them
        self.height_N.grad = (counted_N * (total / counted_N.sum()) - 1).float()
        self.optimizer.param_groups[0]["lr"] = lr * scale
        self.optimizer.step()
        self.height_N -= self.height_N.mean()  # a constant changes no cell
        return index_s, counted_N, carried_K.float().cpu()

    @torch.no_grad()
    def cells(self, x_sD: Tensor, codes: Codes) -> Tensor:
        """The cell of each own point: the row of its code among those of all workers. Collective."""
        z_nD = codes.z_nD.to(self.height_N.device)
        own_n = self.height_N[codes.rows.start : codes.rows.stop]
        top = ceiling(z_nD, own_n)
        return ring_nearest(unlifted(x_sD), lifted(z_nD, own_n, gather(top).max()))[0]

    def state(self) -> State:
        slot = self.optimizer.state[self.height_N]
        moments = {key: {"height": slot[key].cpu().clone()} for key in ("exp_avg", "exp_avg_sq")}
        return {**moments, "updates": float(slot["step"])}


def lifted(y_ND: Tensor, height_N: Tensor, top: Tensor | None = None) -> Tensor:
    """The points (y_i, t_i), [N, D + 1]; `top` is C, the largest |y_i|^2 + 2 h_i of all workers (None: of these)."""
    square_N = y_ND.double().square().sum(1) + 2 * height_N.double()
    top = ceiling(y_ND, height_N) if top is None else top
    return torch.cat([y_ND, (top - square_N).clamp(min=0).sqrt().float()[:, None]], dim=1)


def ceiling(y_ND: Tensor, height_N: Tensor) -> Tensor:
    """C of these codes: the largest |y_i|^2 + 2 h_i, float64 []; -inf of none."""
    square_N = y_ND.double().square().sum(1) + 2 * height_N.double()
    return square_N.max() if len(square_N) else square_N.new_tensor(-torch.inf)


def unlifted(x_ND: Tensor) -> Tensor:
    """The points (x, 0), [N, D + 1]."""
    return torch.cat([x_ND, torch.zeros_like(x_ND[:, :1])], dim=1)
