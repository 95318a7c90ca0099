"""Adaptive IMLE (Aghabozorgi, Peng & Li 2023): a code keeps its match until T has come closer to it.

Each row has a threshold tau_i, the squared distance at its last match. Before an epoch a row is matched anew, among
fresh candidates, only if its held noise now maps to a distance below (1 - change) tau_i: what is hard to reach is
trained on for longer.

Shapes: B rows, D latent dimension, n own rows, N rows of all workers.
"""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from ..config.samplers import AdaptiveImleConfig
from ..models.comm import all_sum
from .base import Codes
from .imle import CHUNK, Imle, Matches


class AdaptiveImle(Imle):
    """The fit; the match and the threshold of every row are part of the state."""

    title = "Adaptive IMLE"
    config: AdaptiveImleConfig

    def matches(self, epoch: int, z_nD: Tensor, codes: Codes) -> Matches:
        """The distances in the result are thresholds: those of each row's last match."""
        began = perf_counter()
        if not self.held:
            matches = self.match(epoch, z_nD, codes.total)
        else:
            matches = self.own_matches(self.held, codes)
            due_n = self.distances(matches, z_nD) < (1 - self.config.change) * matches.distance_n
            if int(all_sum(due_n.sum())):
                fresh = self.match(epoch, z_nD[due_n], codes.total)
                index_n, epoch_n, distance_n = (
                    matches.index_n.clone(),
                    matches.epoch_n.clone(),
                    matches.distance_n.clone(),
                )
                due_cpu_n = due_n.cpu()
                index_n[due_cpu_n], epoch_n[due_cpu_n] = fresh.index_n, fresh.epoch_n
                distance_n[due_n] = fresh.distance_n
                matches = Matches(index_n, epoch_n, distance_n, fresh.recall, perf_counter() - began)
        self.held = self.gathered(matches, codes)
        return matches

    @torch.no_grad()
    def distances(self, matches: Matches, z_nD: Tensor) -> Tensor:
        """Squared distance of each own code from what its held noise maps to now, float64 [n]."""
        self.network.eval()
        parts = [z_nD.new_zeros(0, dtype=torch.float64)]
        for start in range(0, len(z_nD), CHUNK):
            own = slice(start, start + CHUNK)
            mapped_BD = self.network(self.noise_of(matches.epoch_n[own], matches.index_n[own]))
            parts.append((mapped_BD.double() - z_nD[own].double()).square().sum(1))
        return torch.cat(parts)


SAMPLER = AdaptiveImle
