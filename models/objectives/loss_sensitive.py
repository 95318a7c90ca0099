"""The loss-sensitive GAN: a real image's score is below that of a generated one by their distance.

Source: Qi 2017 (LS-GAN, which is not the LSGAN of least squares), Eq. 4 and 5. The distance is the mean absolute
difference of pixels.
"""

from __future__ import annotations

from torch.nn.functional import relu

from .base import Objective


def loss_sensitive(weight: float = 1.0) -> Objective:
    """L(x) + weight [gap + L(x) - L(G)]+ for the critic, L(G) for the generator."""
    return Objective(
        lambda scores: scores.real_B + weight * relu(scores.gap_B + scores.real_B - scores.fake_B),
        lambda scores: scores.fake_B,
        needs_gap=True,
        higher_is_real=False,
    )
