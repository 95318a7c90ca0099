"""Least squares, with the critic's score as it is.

Source: Mao et al. 2017 (LSGAN), Eq. 2: the critic moves generated images to a and real ones to b, the generator its
images to c. With b - c = 1 and b - a = 2 the generator minimises Pearson's chi^2 of p + q and 2 q (Eq. 8).
"""

from __future__ import annotations

from .base import Objective


def least_squares(a: float = 0.0, b: float = 1.0, c: float = 1.0) -> Objective:
    """1/2 (D(x) - b)^2 + 1/2 (D(G) - a)^2 for the critic, 1/2 (D(G) - c)^2 for the generator."""
    return Objective(
        lambda scores: 0.5 * (scores.real_B - b).square() + 0.5 * (scores.fake_B - a).square(),
        lambda scores: 0.5 * (scores.fake_B - c).square(),
    )
