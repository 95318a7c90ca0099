"""Mixtures of Gaussians on a line, with parameters from a network: density, distribution function and its inverse.

Shapes: B batch, A axes, K Gaussians of an axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .noise import normal_share

SMALLEST = 1e-3  # standard deviation of a Gaussian
HALVINGS = 60
REACH = 40.0  # standard deviations around the means in which a quantile is looked for
TINY = 1e-300

Mixture = tuple[Tensor, Tensor, Tensor]  # log weights, means and standard deviations, [B, A, K] each


def mixture_of(numbers: Tensor, components: int) -> Mixture:
    """The mixtures that a network's numbers [B, A, 3 K] stand for."""
    raw_BAK, mean_BAK, log_BAK = numbers.unflatten(2, (3, components)).unbind(2)
    return raw_BAK.log_softmax(2), mean_BAK, F.softplus(log_BAK) + SMALLEST


@torch.no_grad()
def start_mixture(bias_A3K: Tensor) -> None:
    """Set the numbers of a mixture to equal Gaussians side by side, which together are about N(0, 1)."""
    bias_A3K.zero_()
    bias_A3K[:, 1] = torch.linspace(-1.5, 1.5, bias_A3K.shape[2]) if bias_A3K.shape[2] > 1 else 0.0


def mixture_log_density(x_BA: Tensor, log_weight_BAK: Tensor, mean_BAK: Tensor, deviation_BAK: Tensor) -> Tensor:
    """log p(x), [B, A]."""
    square_BAK = ((x_BA[:, :, None] - mean_BAK) / deviation_BAK).square()
    log_BAK = log_weight_BAK - deviation_BAK.log() - 0.5 * square_BAK
    return log_BAK.logsumexp(2) - 0.5 * math.log(2 * math.pi)


def mixture_normal(x_BA: Tensor, log_weight_BAK: Tensor, mean_BAK: Tensor, deviation_BAK: Tensor) -> Tensor:
    """The number with the share of N(0, 1) below it that the mixture has below x, [B, A]; differentiable.

    In float64, and by the smaller of the two shares beside x, so that it is exact far out on both sides.
    """
    weight_BAK = log_weight_BAK.double().exp()
    at_BAK = (x_BA.double()[:, :, None] - mean_BAK.double()) / deviation_BAK.double()
    below_BA = (weight_BAK * normal_share(at_BAK)).sum(2)
    above_BA = (weight_BAK * normal_share(-at_BAK)).sum(2)
    tail_BA = torch.special.ndtri(torch.minimum(below_BA, above_BA).clamp(min=TINY))
    return torch.where(below_BA < above_BA, tail_BA, -tail_BA).to(x_BA.dtype)


def mixture_quantile(u_BA: Tensor, log_weight_BAK: Tensor, mean_BAK: Tensor, deviation_BAK: Tensor) -> Tensor:
    """The points [B, A] below which the mixture has the mass u, by bisection in float64; float32."""
    weight_BAK, mean_BAK = log_weight_BAK.double().exp(), mean_BAK.double()
    deviation_BAK = deviation_BAK.double()
    low_BA = (mean_BAK - REACH * deviation_BAK).amin(2)
    high_BA = (mean_BAK + REACH * deviation_BAK).amax(2)
    for _ in range(HALVINGS):
        middle_BA = 0.5 * (low_BA + high_BA)
        mass_BA = (weight_BAK * normal_share((middle_BA[:, :, None] - mean_BAK) / deviation_BAK)).sum(2)
        below_BA = mass_BA < u_BA
        low_BA, high_BA = torch.where(below_BA, middle_BA, low_BA), torch.where(below_BA, high_BA, middle_BA)
    return (0.5 * (low_BA + high_BA)).float()
