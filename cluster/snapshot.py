"""Rows of a table as they were at one moment, read later and in parts, while the table goes on changing.

A copy of a whole shard takes a second for every few GB, in which nobody gets a code, and as much memory again. Here
only those rows are copied that change before they were read, each just before it does.

Legend: B rows of a batch, n rows held.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor


class FrozenRows:
    """The rows of some tensors as they are now. One thread changes rows and calls `keep`, another one reads."""

    def __init__(self, live: Mapping[str, Tensor]):
        """`live`: tensors [n, ...] that are changed in place, row by row, and never replaced."""
        self._live = dict(live)
        self._count = len(next(iter(self._live.values()), ()))
        self._kept_n = torch.zeros(self._count, dtype=torch.bool)
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._read_to = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @property
    def row_bytes(self) -> int:
        return sum(tensor[:1].nbytes for tensor in self._live.values())

    def keep(self, at_B: Tensor) -> None:
        """To be called before these rows change: what has not been read of them is copied."""
        with self._lock:
            new_B = at_B[(at_B >= self._read_to) & ~self._kept_n[at_B]]
            if len(new_B):
                self._kept_n[new_B] = True
                self._kept.append((new_B, {name: tensor[new_B] for name, tensor in self._live.items()}))

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """The rows from `start`, where the last call stopped, to `stop`."""
        if start != self._read_to:
            raise ValueError(f"rows are read in order: {self._read_to} comes next, not {start}")
        # A row that changes meanwhile may be copied in the middle of that. It was kept before, and that counts.
        rows = {name: tensor[start:stop].clone() for name, tensor in self._live.items()}
        with self._lock:
            self._read_to = stop
            kept = list(self._kept)
        for at_B, values in kept:
            inside = (at_B >= start) & (at_B < stop)
            for name, value_B in values.items():
                rows[name][at_B[inside] - start] = value_B[inside]
        return rows
