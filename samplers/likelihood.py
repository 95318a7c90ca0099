"""Samplers with an exact likelihood: the codes' negative log-likelihood is the loss.

Shapes: B own rows of a batch, D latent dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.samplers import ArConfig, CouplingConfig
from ..models.autoregressive import Autoregressive
from ..models.coupling import CouplingFlow
from ..models.noise import noise
from .adam import AdamSampler, Batch


class LikelihoodSampler(AdamSampler):
    """Base of such samplers.

    Codes on the sphere have no density, and few of them are fitted exactly: `blur` adds noise to them in training, new
    noise in every epoch. A draw is projected like every code.
    """

    config: CouplingConfig | ArConfig
    network: CouplingFlow | Autoregressive

    def loss(self, batch: Batch) -> Tensor:
        """Nats of a code, less a constant: those of the standardised and blurred code."""
        x_BD = batch.z_BD
        if self.config.blur:
            e_BD = noise(self.seed, batch.epoch, batch.index_B, x_BD.shape[1], x_BD.device)
            x_BD = x_BD + self.config.blur * e_BD
        return self.network.nll(x_BD)

    @torch.inference_mode()
    def nll(self, z_BD: Tensor) -> Tensor:
        """Negative log-likelihood of codes in nats, [B], before the projection that follows a draw."""
        self.network.eval()
        return self.network.nll(self.network.standard(z_BD)) + z_BD.shape[1] * self.network.scale.log()
