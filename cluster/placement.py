"""Assignment of rows to workers, and the order of visits: pure functions, so nothing has to be saved.

Legend: B rows of a local batch, N rows of the data set, n rows of one worker, S steps, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..datasets.loader import PlannedBatch

_LOCAL, _GLOBAL = 1, 2  # keeps the permutations of stage 1 and stage 2 apart for equal seeds


def ranges(rows: int, world: int) -> list[range]:
    """The contiguous rows of every worker, equal to within one row; the first workers have the extra row."""
    share, extra = divmod(rows, world)
    starts = [rank * share + min(rank, extra) for rank in range(world + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


@dataclass(frozen=True)
class Share:
    """One worker's share of the global batches of stage 1: rows are dealt round-robin.

    Row k of worker w is number k W + w of the epoch, and a global batch is the next `batch` numbers. So a global
    batch has `batch` rows and an epoch ceil(N / batch) steps whatever W is, and workers' parts differ by one row.

    Args:
        batch: rows of a global batch.
        rank, world: the worker's rank, and the number of workers.
        accumulation: micro-batches that a local batch is cut into.
    """

    batch: int
    rank: int = 0
    world: int = 1
    accumulation: int = 1

    @property
    def size(self) -> int:
        """Rows of a local batch with its padding: the same on every worker, and equal micro-batches."""
        return self.accumulation * _ceil(self.batch, self.world * self.accumulation)

    def dealt(self, steps: int) -> int:
        """Rows of this worker in the first `steps` global batches."""
        return _ceil(steps * self.batch - self.rank, self.world) if steps else 0

    def steps(self, rows: int) -> int:
        """Global batches until this worker has had `rows` rows."""
        return ((rows - 1) * self.world + self.rank) // self.batch + 1 if rows else 0


def steps_left(epoch: int, share: Share, visited_n: np.ndarray, first_step: int = 0) -> int:
    """Steps that one worker still needs in `epoch` from `first_step` on; the epoch has the maximum over workers.

    Args:
        visited_n: visits of each row of the worker since the start of the run.
    """
    rows = int(np.count_nonzero(visited_n <= epoch))
    return share.steps(share.dealt(first_step) + rows) - first_step if rows else 0


def epoch_plan(
    seed: int,
    epoch: int,
    rows_of_worker: range,
    share: Share,
    steps: int,
    visited_n: np.ndarray | None = None,
    first_step: int = 0,
) -> list[PlannedBatch]:
    """The batches of one worker in one epoch, a pure function of its arguments.

    Args:
        epoch: counted from 0.
        steps: number of batches to return, the same on every worker: the largest `steps_left` of all.
        visited_n: visits of each row since the start of the run; rows with more than `epoch` visits are done in
            this epoch and left out. None: no row is done.
        first_step: number of the first batch, for an epoch that is resumed.
    Returns:
        `steps` batches, numbered from `first_step`. A short or empty batch is padded to `share.size` rows
        with a real row of the range at weight zero. The order of the rows depends on (seed, epoch,
        range) alone: leaving out visited rows does not change the order of the others.
    Raises:
        ValueError: an empty range (without a row to pad with), or more rows than fit in `steps` batches.
    """
    if not rows_of_worker:
        raise ValueError("a worker needs at least one row, but there are more workers than rows")
    order_n = _permutation(len(rows_of_worker), _LOCAL, seed, epoch, rows_of_worker.start, rows_of_worker.stop)
    if visited_n is not None:
        if visited_n.shape != order_n.shape:
            raise ValueError(f"visited_n has shape {visited_n.shape} for a range of {len(rows_of_worker)} rows")
        order_n = order_n[visited_n[order_n] <= epoch]
    dealt_S = [share.dealt(first_step + step) - share.dealt(first_step) for step in range(steps + 1)]
    if len(order_n) > dealt_S[-1]:
        raise ValueError(f"{len(order_n)} rows do not fit {steps} batches of {share.size}")
    plan = []
    for step, (start, stop) in enumerate(pairwise(dealt_S)):
        own_B = order_n[start:stop] + rows_of_worker.start
        rows_B = np.full(share.size, rows_of_worker.start, np.int64)
        rows_B[: len(own_B)] = own_B
        weight_B = (np.arange(share.size) < len(own_B)).astype(np.float32)
        plan.append(PlannedBatch(first_step + step, rows_B, weight_B))
    return plan


def global_batches(seed: int, epoch: int, rows: int, batch: int) -> list[np.ndarray]:
    """The global batches of stage 2: a permutation of all N rows, cut; the last batch may be short.

    It does not depend on the number of workers, so neither does the path of the mapping.
    """
    order_N = _permutation(rows, _GLOBAL, seed, epoch)
    return [order_N[at : at + batch] for at in range(0, rows, batch)]


def _permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n-1, the same on every machine and with every numpy version.

    NEP 19 guarantees a stable stream for raw bit generators, not for `Generator.permutation`, so raw words of Philox
    are ranked. Ties of 64-bit words, which practically never occur, are resolved by a stable sort.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
