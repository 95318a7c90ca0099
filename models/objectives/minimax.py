"""The original game, with the critic's score as logit: D = sigmoid(score).

Source: Goodfellow et al. 2014, Eq. 1 (minimax) and Sec. 3 (non-saturating). Smoothing of real labels only: Salimans et
al. 2016, Sec. 3.4; the optimum is then D* = smooth p / (p + q).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from .base import Objective, Scores


def critic(scores: Scores, smooth: float = 1.0) -> Tensor:
    """-(smooth log D(x) + (1 - smooth) log(1 - D(x))) - log(1 - D(G))."""
    real_B, fake_B = scores.real_B, scores.fake_B
    return smooth * softplus(-real_B) + (1 - smooth) * softplus(real_B) + softplus(fake_B)


def minimax(smooth: float = 1.0) -> Objective:
    """The generator minimises log(1 - D(G))."""
    return Objective(lambda scores: critic(scores, smooth), lambda scores: -softplus(scores.fake_B))


def non_saturating(smooth: float = 1.0) -> Objective:
    """The generator maximises log D(G)."""
    return Objective(lambda scores: critic(scores, smooth), lambda scores: softplus(-scores.fake_B))
