"""Learning-rate factors over a stage; time is counted in epochs so that it does not depend on the batch."""

from __future__ import annotations

import math

from .sections import ScheduleConfig


def factor(schedule: ScheduleConfig, epoch: float, epochs: int) -> float:
    """What the learning rate is multiplied by at `epoch` (0.25: a quarter into the first) of `epochs`."""
    warm = min(1.0, epoch / schedule.warmup) if schedule.warmup and epoch < schedule.warmup else 1.0
    if schedule.kind == "halving":  # the paper's: constant within an epoch
        return warm * 0.5 ** (int(epoch) // schedule.every)
    if schedule.kind == "cosine":
        done = max(0.0, epoch - schedule.warmup) / max(epochs - schedule.warmup, 1e-9)
        return warm * (schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    return warm
