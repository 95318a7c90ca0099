"""Rows of a latent table for tests of checkpoints, without a table."""

from __future__ import annotations

import numpy as np
import torch
from glann.cluster.checkpoints.pieces import write_rows
from glann.cluster.snapshot import Snapshot


class Held:
    """Rows that write themselves when they are asked for."""

    def __init__(self, first_row: int, arrays: dict[str, np.ndarray]):
        self.first_row, self.arrays = first_row, arrays

    def start_saving(self, store, folder, block_bytes):
        copy = {name: torch.tensor(array) for name, array in self.arrays.items()}
        return lambda: write_rows(store, folder, self.first_row, Snapshot(copy), block_bytes)
