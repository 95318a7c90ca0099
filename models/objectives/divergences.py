"""f-divergences of the data p and the generator's q, estimated from below: E_p T - E_q f*(T), with T = g(score).

Source: Nowozin, Cseke & Tomioka 2016 (f-GAN), Eq. 4 and 7, and the activations g and conjugates f* of their table.
The best T is f'(p / q). Every g grows with the score here, so that real images have the higher scores. Both players
follow the same bound (their single-step method, Algorithm 1).

f*(g(v)) is written out: composed, the exponentials of large scores would overflow before their logarithms are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import Objective


class Divergence(NamedTuple):
    """activation: T = g(v) of a score v. conjugate: f*(g(v))."""

    activation: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]


DIVERGENCES = {
    "kl": Divergence(lambda v: v, lambda v: torch.exp(v - 1)),
    "reverse-kl": Divergence(lambda v: -torch.exp(-v), lambda v: v - 1),
    "pearson": Divergence(lambda v: v, lambda v: 0.25 * v.square() + v),
    "neyman": Divergence(lambda v: 1 - torch.exp(-v), lambda v: 2 - 2 * torch.exp(-0.5 * v)),
    "hellinger": Divergence(lambda v: 1 - torch.exp(-v), lambda v: torch.exp(v) - 1),
    "js": Divergence(lambda v: math.log(2) - softplus(-v), lambda v: softplus(v) - math.log(2)),
    "gan": Divergence(lambda v: -softplus(-v), softplus),
    "tv": Divergence(lambda v: 0.5 * torch.tanh(v), lambda v: 0.5 * torch.tanh(v)),
}


def divergence(name: str) -> Objective:
    """f*(T(G)) - T(x) for the critic, -f*(T(G)) for the generator; `name` is one of DIVERGENCES."""
    activation, conjugate = DIVERGENCES[name]
    return Objective(
        lambda scores: conjugate(scores.fake_B) - activation(scores.real_B),
        lambda scores: -conjugate(scores.fake_B),
    )
