"""Energies: the score is how badly an autoencoder reproduces an image, so real images have the lower scores.

Source: Zhao, Mathieu & LeCun 2017 (EBGAN), Eq. 1 and 2; their pull-away term is a term (`terms`). Berthelot, Schumm &
Metz 2017 (BEGAN), Sec. 3.4.
"""

from __future__ import annotations

from torch.nn.functional import relu

from .base import Objective


def energy(margin: float = 0.2) -> Objective:
    """D(x) + [margin - D(G)]+ for the critic, D(G) for the generator."""
    return Objective(
        lambda scores: scores.real_B + relu(margin - scores.fake_B),
        lambda scores: scores.fake_B,
        higher_is_real=False,
    )


def began(gamma: float = 0.75, rate: float = 0.001) -> Objective:
    """L(x) - k L(G) for the critic, L(G) for the generator; k follows the ratio of both to gamma.

    k <- k + rate (gamma E L(x) - E L(G)), within [0, 1].
    """
    return Objective(
        lambda scores: scores.real_B - scores.balance * scores.fake_B,
        lambda scores: scores.fake_B,
        rebalanced=lambda k, real, fake: min(1.0, max(0.0, k + rate * (gamma * real - fake))),
        higher_is_real=False,
    )


def convergence(real: float, fake: float, gamma: float) -> float:
    """BEGAN's global measure of convergence: L(x) + |gamma L(x) - L(G)|."""
    return real + abs(gamma * real - fake)
