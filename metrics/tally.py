"""What a metric keeps of the images seen so far: it streams over batches, and merges over workers.

Legend: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from ..errors import UserError


class Tally(Protocol):
    """Sufficient statistics of a set of images. Immutable: `update` and `merge` return new ones."""

    def update(self, seen: Tensor, /) -> Self:
        """With one batch more: uint8 images [B, C, H, W], or their features [B, F]."""
        ...

    def merge(self, other: Self, /) -> Self:
        """Of both sets of images together."""
        ...


@dataclass(frozen=True)
class Mean:
    """A running mean over images of one number each."""

    count: int = 0
    total: float = 0.0

    def update(self, value_B: Tensor, /) -> Mean:
        return self.merge(Mean(len(value_B), float(value_B.sum())))

    def merge(self, other: Mean, /) -> Mean:
        return Mean(self.count + other.count, self.total + other.total)

    def value(self) -> float:
        """Raises UserError where there was no image."""
        if self.count == 0:
            raise UserError("no images were compared, so there is no mean over them")
        return self.total / self.count
