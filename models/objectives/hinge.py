"""The hinge loss. Source: Lim & Ye 2017; Miyato et al. 2018 (SNGAN), Eq. 16 and 17."""

from __future__ import annotations

from torch.nn.functional import relu

from .base import Objective


def hinge() -> Objective:
    """[1 - D(x)]+ + [1 + D(G)]+ for the critic, -D(G) for the generator."""
    return Objective(lambda scores: relu(1 - scores.real_B) + relu(1 + scores.fake_B), lambda scores: -scores.fake_B)
