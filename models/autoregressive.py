"""A masked network whose output for an axis depends on the axes before it (MADE, Germain et al. 2015).

Shapes: B batch, D latent dimension (and of the noise), H hidden width, K Gaussians of an axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mapping import Standardised
from .mixtures import Mixture, mixture_log_density, mixture_of, mixture_quantile, start_mixture
from .noise import uniform
from .sphere import Constraint


class MaskedLinear(nn.Linear):
    """A linear layer of which only the weights of a mask are used."""

    mask: Tensor

    def __init__(self, mask_OI: Tensor) -> None:
        super().__init__(mask_OI.shape[1], mask_OI.shape[0])
        self.register_buffer("mask", mask_OI.float())

    def forward(self, x_BI: Tensor) -> Tensor:
        return F.linear(x_BI, self.weight * self.mask, self.bias)


class Autoregressive(Standardised):
    """p(x) = prod_d sum_k w_k N(x_d; m_k, s_k), with w, m and s functions of x_1 ... x_{d-1}.

    A draw takes the axes in their order: x_d is the quantile of its mixture at the quantile of e_d in N(0, 1), which is
    a continuous and increasing function of e_d.
    """

    def __init__(self, latent_dim: int, components: int, width: int, depth: int, constraint: Constraint) -> None:
        super().__init__(latent_dim, latent_dim, constraint)
        self.components = components
        axis_D = torch.arange(latent_dim)
        degree_H = torch.arange(width) % latent_dim if latent_dim > 1 else torch.zeros(width).long()
        # a hidden unit of degree m sees the axes before m: x_0 ... x_{m-1}
        layers: list[nn.Module] = [MaskedLinear(degree_H[:, None] > axis_D[None]), nn.SiLU()]
        for _ in range(depth - 1):
            layers += [MaskedLinear(degree_H[:, None] >= degree_H[None]), nn.SiLU()]
        out_O = axis_D.repeat_interleave(3 * components)
        self.body = nn.Sequential(*layers, MaskedLinear(out_O[:, None] >= degree_H[None]))
        last: MaskedLinear = self.body[-1]  # type: ignore[assignment]
        with torch.no_grad():
            last.weight.mul_(0.1)
        start_mixture(last.bias.view(latent_dim, 3, components))

    def mixtures(self, x_BD: Tensor) -> Mixture:
        """The mixture of every axis given those before it."""
        return mixture_of(self.body(x_BD).view(-1, self.latent_dim, 3 * self.components), self.components)

    def nll(self, x_BD: Tensor) -> Tensor:
        """Negative log-likelihood of points in the network's units, in nats [B]."""
        return -mixture_log_density(x_BD, *self.mixtures(x_BD)).sum(1)

    def forward(self, e_BE: Tensor) -> Tensor:
        x_BD = torch.zeros_like(e_BE)
        for axis in range(self.latent_dim):
            own = slice(axis, axis + 1)
            parts = (part[:, own] for part in self.mixtures(x_BD))
            x_BD = torch.cat([x_BD[:, :axis], mixture_quantile(uniform(e_BE[:, own]), *parts), x_BD[:, axis + 1 :]], 1)
        return self.codes_of(x_BD)
