"""The difference of the mean scores, whose largest value over critics of slope 1 is the Wasserstein distance.

What bounds the slope is not part of the objective: clipped weights (Arjovsky et al. 2017, Algorithm 1), a gradient
penalty (Gulrajani et al. 2017, Eq. 3; `penalties`), or spectral normalisation.
"""

from __future__ import annotations

from .base import Objective


def wasserstein() -> Objective:
    """D(G) - D(x) for the critic, -D(G) for the generator."""
    return Objective(lambda scores: scores.fake_B - scores.real_B, lambda scores: -scores.fake_B)
