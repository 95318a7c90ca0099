"""The relativistic pairing: only the difference between a real and a generated image counts.

Source: Jolicoeur-Martineau 2019; Huang et al. 2024 (R3GAN), Eq. 2, with the penalties R1 and R2 (`penalties`) on both.
"""

from __future__ import annotations

from torch.nn.functional import softplus

from .base import Objective


def relativistic() -> Objective:
    """-log sigmoid(D(x) - D(G)) for the critic, the same with the two exchanged for the generator."""
    return Objective(
        lambda scores: softplus(scores.fake_B - scores.real_B),
        lambda scores: softplus(scores.real_B - scores.fake_B),
        needs_real=True,
    )
