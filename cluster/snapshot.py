"""Copy-on-write snapshot of table rows, read in parts while the table keeps changing.

Copying a whole shard takes a second for every few GB, during which no code can be gathered, and doubles its memory.
The snapshot copies only rows that change before they have been read, each right before its first change.

Legend: B rows of a batch, n rows of the table.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshot:
    """The rows of some tensors at the moment of construction.

    One thread changes rows, after `preserve`, and another one reads.
    """

    def __init__(self, table: Mapping[str, Tensor]):
        """`table`: tensors [n, ...] that are changed in place, row by row, and never replaced."""
        self._table = dict(table)
        self._count = len(next(iter(self._table.values()), ()))
        self._preserved_n = torch.zeros(self._count, dtype=torch.bool)
        self._copies: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._read_to = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @property
    def row_bytes(self) -> int:
        """Size of a row over all tensors, in bytes."""
        return sum(tensor[:1].nbytes for tensor in self._table.values())

    def preserve(self, at_B: Tensor) -> None:
        """Copy these rows unless they have been read or copied; call it before they change."""
        with self._lock:
            new_B = at_B[(at_B >= self._read_to) & ~self._preserved_n[at_B]]
            if len(new_B):
                self._preserved_n[new_B] = True
                self._copies.append((new_B, {name: tensor[new_B] for name, tensor in self._table.items()}))

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows `start` to `stop` of every tensor; each call starts where the last one stopped.

        Raises:
            ValueError: another `start`.
        """
        if start != self._read_to:
            raise ValueError(f"rows are read in order: {self._read_to} comes next, not {start}")
        # A row that changes during this copy may be torn, but it was preserved before, and that copy replaces it.
        rows = {name: tensor[start:stop].clone() for name, tensor in self._table.items()}
        with self._lock:
            self._read_to = stop
            copies = list(self._copies)
        for at_B, values in copies:
            inside = (at_B >= start) & (at_B < stop)
            for name, value_B in values.items():
                rows[name][at_B[inside] - start] = value_B[inside]
        return rows
