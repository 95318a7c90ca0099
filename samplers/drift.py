"""Drifting model over the codes (Deng, Li, Li, Du & He 2026, arXiv 2602.04770): a generator of one step whose draws are
moved, while it is trained, towards the codes and away from one another.

Shapes: B own rows of a batch, T all rows of it, D latent dimension, E noise dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ..config.samplers import DriftConfig, SamplerConfig
from ..models.comm import all_sum
from ..models.mlp import OneStep
from ..models.noise import noise
from ..models.sphere import Constraint
from .adam import AdamSampler, Batch


class DriftSampler(AdamSampler):
    """The fit of x = f(e) to its drifted self: |x - stop_gradient(x + V(x))|^2, V summed over the temperatures.

    As in the paper, each temperature's V is divided by its root mean square, so the size of the steps does not fall;
    the learning rate's schedule has to. The loss that is reported is the mean |V|^2 before that division, which falls
    as the draws become those of the codes.
    """

    title = "Drifting"
    config: DriftConfig
    network: OneStep

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> OneStep:
        keys = cast(DriftConfig, config)
        return OneStep(keys.noise_dim, latent_dim, keys.hidden_dim, keys.depth, keys.activation, constraint)

    def loss(self, batch: Batch) -> Tensor:
        e_BE = noise(self.seed, batch.epoch, batch.index_B, self.config.noise_dim, self.device)
        x_BD = self.network.body(e_BE)
        own_B = batch.own_B.to(self.device)
        both_2TD = torch.zeros(2, len(batch.index_T), x_BD.shape[1], device=self.device)
        both_2TD[0, own_B], both_2TD[1, own_B] = x_BD.detach(), batch.z_BD
        all_sum(both_2TD)  # exact: every row is one worker's, and the others add zeros
        total_TD, size_T = torch.zeros_like(both_2TD[0]), torch.zeros(len(batch.index_T), device=self.device)
        for v_TD in drifts(both_2TD[0], both_2TD[1], self.config.temperatures):
            size_T += v_TD.square().mean(1) / len(self.config.temperatures)
            total_TD += v_TD / v_TD.square().mean().sqrt().clamp(min=1e-12)
        loss_B = (x_BD - (x_BD.detach() + total_TD[own_B])).square().mean(1)
        return loss_B + (size_T[own_B] - loss_B).detach()  # the gradient of the one, the value of the other


def drifts(x_TD: Tensor, y_TD: Tensor, temperatures: Sequence[float]) -> Iterator[Tensor]:
    """The drift V [T, D] of draws x towards codes y and away from x, at each temperature.

    V(x) = sum_{y, x'} k(x, y) k(x, x') (y - x') with k(x, y) = exp(-|x - y| / tau), each of the two kernels normalised
    over what it sums over; tau is the temperature times the mean distance. As in the public code, kernels are
    normalised by the root of the product of their sums over a draw's row and over a column, and a draw does not repel
    itself.
    """
    distance_TT2 = torch.cdist(x_TD, torch.cat([y_TD, x_TD]), compute_mode="donot_use_mm_for_euclid_dist")
    count, mean = len(x_TD), distance_TT2.mean().clamp(min=1e-12)
    distance_TT2[:, count:].fill_diagonal_(torch.inf)
    for temperature in temperatures:
        logit_TT2 = distance_TT2 / (-temperature * mean)
        share_TT2 = (0.5 * (logit_TT2.log_softmax(1) + logit_TT2.log_softmax(0))).exp()
        near_TT, own_TT = share_TT2[:, :count], share_TT2[:, count:]
        towards_TT = near_TT * own_TT.sum(1, keepdim=True)
        away_TT = own_TT * near_TT.sum(1, keepdim=True)
        yield towards_TT @ y_TD - away_TT @ x_TD


SAMPLER = DriftSampler
