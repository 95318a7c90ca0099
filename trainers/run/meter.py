"""Loss and throughput of a worker group, as one of its workers measures them."""

from __future__ import annotations

import math
from time import monotonic


class Meter:
    """Mean loss and throughput since it was made; utilisation where the peak of the devices is known."""

    def __init__(self, flops: int = 0, peak: float | None = None) -> None:
        """`flops`: of an image, forward and backward. `peak`: FLOP/s of all workers' devices together."""
        self.flops, self.peak = flops, peak
        self.began, self.losses, self.steps, self.images = monotonic(), 0.0, 0, 0

    def add(self, loss: float | None, images: int) -> None:
        """Count a step of all workers together."""
        if loss is not None and math.isfinite(loss):
            self.losses += loss
            self.steps += 1
        self.images += images

    def loss(self) -> float:
        """Mean over the steps whose loss is known."""
        return self.losses / self.steps if self.steps else float("nan")

    def seconds(self) -> float:
        """Since it was made."""
        return monotonic() - self.began

    def rate(self) -> float:
        """Images per second of all workers."""
        return self.images / max(self.seconds(), 1e-9)

    def speed(self) -> dict[str, float]:
        """Images/s, and the model FLOP utilisation (MFU) that this is; nothing where no images are visited."""
        if not self.images:
            return {}
        speed = {"images_per_s": self.rate()}
        return speed | {"mfu": self.rate() * self.flops / self.peak} if self.peak else speed
