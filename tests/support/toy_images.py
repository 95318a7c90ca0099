"""Images of a few grey rectangles in memory, for loops that read rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


class ToyImages:
    """A stand-in for `ImageRows`: image i is a function of i."""

    def __init__(self, rows: int, resolution: int = 28, channels: int = 1) -> None:
        self.rows = rows
        self.index = SimpleNamespace(channels=channels, resolution=resolution, held_out=None)

    def __len__(self) -> int:
        return self.rows

    def labels(self) -> np.ndarray:
        return np.arange(self.rows, dtype=np.int32) % 3

    def decode(self, row: int) -> np.ndarray:
        image = np.zeros((self.index.channels, self.index.resolution, self.index.resolution), np.uint8)
        image[:, row % 9 : 12 + row % 7, row % 5 : 14 + row % 3] = 60 + 7 * (row % 20)
        return image
