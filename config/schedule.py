"""Learning-rate schedules over epochs, so that they do not depend on the batch size."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from .section import Fraction, Section


class ScheduleConfig(Section):
    """Learning-rate factor over a stage."""

    kind: Literal["constant", "halving", "cosine"] = Field("constant", description="shape of the factor over epochs")
    every: int = Field(50, ge=1, description="epochs between halvings (halving)")
    floor: Fraction = Field(0.0, description="final factor (cosine)")
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up")

    def factor(self, epoch: float, epochs: int) -> float:
        """Factor of the learning rate at the fractional `epoch` (0.25: a quarter into the first) of `epochs`."""
        warm = min(1.0, epoch / self.warmup) if self.warmup and epoch < self.warmup else 1.0
        if self.kind == "halving":  # the paper's: constant within an epoch
            return warm * 0.5 ** (int(epoch) // self.every)
        if self.kind == "cosine":
            done = max(0.0, epoch - self.warmup) / max(epochs - self.warmup, 1e-9)
            return warm * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        return warm


class GloScheduleConfig(ScheduleConfig):
    """The published schedule: halving. A separate class, so that setting one key keeps the other defaults."""

    kind: Literal["constant", "halving", "cosine"] = Field("halving", description="shape of the factor over epochs")
