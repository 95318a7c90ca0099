"""The records of a packed data set: place and hash of every image.

Of a large data set they are read and checked in blocks, when a row of a block is first asked for: a worker holds those
of the rows that it reads.

Legend: N rows, K rows of a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("sha256", "u1", (32,))])
BLOCK_ROWS = 1 << 16  # 2.9 MB


class Records:
    """Records by row. Safe for use by many threads.

    Args:
        rows: N.
        block_rows: rows of a block; the last may have fewer.
        read: the checked records [K] of a block, by its number.
    """

    def __init__(self, rows: int, block_rows: int, read: Callable[[int], np.ndarray]) -> None:
        self.rows, self.block_rows, self._read = rows, block_rows, read
        self._blocks: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock: an index travels to other processes."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @classmethod
    def loaded(cls, records_N: np.ndarray) -> Records:
        """Records in memory."""
        return cls(len(records_N), max(1, len(records_N)), partial(_only_block, records_N))

    def __getitem__(self, row: int) -> np.void:
        """The record of a row. Raises UserError if its block is damaged."""
        number, place = divmod(row, self.block_rows)
        return self.block(number)[place]

    def block(self, number: int) -> np.ndarray:
        """The records of a block, which stay in memory."""
        with self._lock:
            if number not in self._blocks:
                self._blocks[number] = self._read(number)
            return self._blocks[number]

    def whole(self) -> np.ndarray:
        """All records [N], in memory."""
        blocks = [self.block(number) for number in range(-(-self.rows // self.block_rows))]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _only_block(records_N: np.ndarray, number: int) -> np.ndarray:
    del number
    return records_N
