"""Loss and throughput of a worker group, measured by one worker."""

from __future__ import annotations

import math
from time import monotonic


class Meter:
    """Mean loss and throughput since construction; utilisation if the peak rate of the devices is known."""

    def __init__(self, flops: int = 0, peak: float | None = None) -> None:
        """`flops`: of the model per image, forward and backward. `peak`: FLOP/s of all workers' devices together."""
        self.flops, self.peak = flops, peak
        self.began, self.losses, self.steps, self.images = monotonic(), 0.0, 0, 0

    def add(self, loss: float | None, images: int) -> None:
        """Count a global step; `images` is over all workers."""
        if loss is not None and math.isfinite(loss):
            self.losses += loss
            self.steps += 1
        self.images += images

    def loss(self) -> float:
        """Mean loss over the steps where it is known and finite."""
        return self.losses / self.steps if self.steps else float("nan")

    def seconds(self) -> float:
        """Seconds since construction."""
        return monotonic() - self.began

    def rate(self) -> float:
        """Images per second of all workers."""
        return self.images / max(self.seconds(), 1e-9)

    def speed(self) -> dict[str, float]:
        """Images/s and model FLOP utilisation (MFU); empty if no images were visited."""
        if not self.images:
            return {}
        speed = {"images_per_s": self.rate()}
        return speed | {"mfu": self.rate() * self.flops / self.peak} if self.peak else speed
