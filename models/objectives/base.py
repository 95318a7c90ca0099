"""The interface of objectives.

Everything is per row: the mean over rows, and over workers, is the engine's. So a padded row weighs nothing, and
neither the batch's cut nor the number of workers changes a loss.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """What the critic says of a real and of a generated image of every row.

    gap_B: distance of the two images; of objectives that need it. balance: k of BEGAN, else 0.
    """

    real_B: Tensor
    fake_B: Tensor
    gap_B: Tensor | float = 0.0
    balance: float = 0.0


@dataclass(frozen=True)
class Objective:
    """An objective of two players, both minimised.

    critic, generator: loss per row, float [B].
    needs_real: the generator's loss looks at the real images' scores. needs_gap: the critic's looks at `gap_B`.
    rebalanced: (k, mean real score, mean generated score, over all workers) -> the next k.
    higher_is_real: whether the critic gives real images the higher score.
    """

    critic: Callable[[Scores], Tensor]
    generator: Callable[[Scores], Tensor]
    needs_real: bool = False
    needs_gap: bool = False
    rebalanced: Callable[[float, float, float], float] | None = None
    higher_is_real: bool = True
