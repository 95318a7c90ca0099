"""Streaming statistics of metrics: updated batch by batch, and merged over workers.

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
        """Add one batch: uint8 images [B, C, H, W], or their features [B, F]."""
        ...

    def merge(self, other: Self, /) -> Self:
        """The statistics of the union of both sets."""
        ...


@dataclass(frozen=True)
class Mean:
    """The running mean of one number per image."""

    count: int = 0
    total: float = 0.0

    def update(self, value_B: Tensor, /) -> Mean:
        return self.merge(Mean(len(value_B), float(value_B.sum())))

    def merge(self, other: Mean, /) -> Mean:
        return Mean(self.count + other.count, self.total + other.total)

    def value(self) -> float:
        """The mean. Raises UserError if there were no images."""
        if self.count == 0:
            raise UserError("no images were compared, so there is no mean over them")
        return self.total / self.count
