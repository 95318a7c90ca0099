"""Coupling flows: invertible networks with exact likelihood (RealNVP, Dinh, Sohl-Dickstein & Bengio 2017).

Shapes: B batch, D latent dimension (and of the noise), A axes that a layer moves.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .mapping import Standardised
from .mixtures import mixture_log_density, mixture_normal, mixture_of, mixture_quantile, start_mixture
from .mlp import mlp
from .noise import uniform
from .sphere import Constraint

LARGEST = 3.0  # log of the largest factor of an affine coupling


class CouplingFlow(Standardised):
    """z = f(e) with f invertible: each layer maps one half of the axes by functions with parameters of the other half.

    One component is RealNVP (its Eqs. 4, 5 and 7): y_a = x_a, y_b = x_b exp(s(x_a)) + t(x_a), with s bounded by a tanh.
    More are the couplings of Flow++ (Ho et al. 2019), here with Gaussians: y_b is the quantile, in a mixture with
    parameters of x_a, of the share of N(0, 1) below x_b; of one Gaussian this is the same affine map. Axes change sides
    in a fixed order that is shuffled from pair to pair of layers.
    """

    def __init__(
        self, latent_dim: int, layers: int, components: int, width: int, depth: int, constraint: Constraint
    ) -> None:
        super().__init__(latent_dim, latent_dim, constraint)
        self.kept, self.components = latent_dim // 2, components
        self.numbers = 2 if components == 1 else 3 * components
        self.moved = latent_dim - self.kept
        self.body = nn.ModuleList(mlp(self.kept, width, depth, self.numbers * self.moved) for _ in range(layers))
        for net in self.body:
            last: nn.Linear = net[-1]  # type: ignore[index,assignment]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            if components > 1:
                start_mixture(last.bias.view(self.moved, 3, components))
        self.orders = [axis_order(latent_dim, layer) for layer in range(layers)]

    def forward(self, e_BE: Tensor) -> Tensor:
        x_BD = e_BE
        for net, (order, back) in zip(self.body, self.orders, strict=True):
            kept_BA, moved_BA = x_BD[:, order].split([self.kept, self.moved], dim=1)
            numbers = net(kept_BA).view(-1, self.moved, self.numbers)
            if self.components == 1:
                log_BA, shift_BA = affine(numbers)
                moved_BA = moved_BA * log_BA.exp() + shift_BA
            else:
                moved_BA = mixture_quantile(uniform(moved_BA), *mixture_of(numbers, self.components))
            x_BD = torch.cat([kept_BA, moved_BA], dim=1)[:, back]
        return self.codes_of(x_BD)

    def nll(self, x_BD: Tensor) -> Tensor:
        """Negative log-likelihood of points in the network's units, in nats [B] (Eq. 3 of RealNVP)."""
        log_B = x_BD.new_zeros(len(x_BD))
        for net, (order, back) in reversed(list(zip(self.body, self.orders, strict=True))):
            kept_BA, moved_BA = x_BD[:, order].split([self.kept, self.moved], dim=1)
            numbers = net(kept_BA).view(-1, self.moved, self.numbers)
            if self.components == 1:
                log_BA, shift_BA = affine(numbers)
                moved_BA = (moved_BA - shift_BA) * (-log_BA).exp()
            else:
                parts = mixture_of(numbers, self.components)
                density_BA, moved_BA = mixture_log_density(moved_BA, *parts), mixture_normal(moved_BA, *parts)
                log_BA = -density_BA - 0.5 * moved_BA.square() - 0.5 * math.log(2 * math.pi)
            x_BD = torch.cat([kept_BA, moved_BA], dim=1)[:, back]
            log_B = log_B + log_BA.sum(1)
        return log_B + 0.5 * x_BD.square().sum(1) + 0.5 * x_BD.shape[1] * math.log(2 * math.pi)


def affine(numbers_BA2: Tensor) -> tuple[Tensor, Tensor]:
    """log factors and shifts [B, A] of an affine coupling."""
    raw_BA, shift_BA = numbers_BA2.unbind(2)
    return LARGEST * torch.tanh(raw_BA / LARGEST), shift_BA


def axis_order(dim: int, layer: int) -> tuple[list[int], list[int]]:
    """The axes in the order in which a layer sees them, the kept half first, and the inverse of that order.

    Every second layer moves what the one before kept; between such pairs the order is shuffled.
    """
    words = np.random.Philox(np.random.SeedSequence(layer // 2)).random_raw(dim)  # the same with every version of numpy
    order = np.argsort(words, kind="stable").tolist()
    order = order[dim - dim // 2 :] + order[: dim - dim // 2] if layer % 2 else order
    return order, sorted(range(dim), key=order.__getitem__)
