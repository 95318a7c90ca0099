"""Assignment of rows to workers, and the order of visits: pure functions, so nothing has to be saved.

Legend: B rows of a local batch, N rows of the data set, n rows of one worker, S steps, W workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..datasets.loader import PlannedBatch
from .index_cipher import IndexCipher

_AT_ONCE = 1 << 15  # places of a permutation that are computed together: each call costs a fraction of a millisecond
_LOCAL, _GLOBAL, _STRATA = 1, 2, 3  # keeps the permutations of the stages apart for equal seeds


def ranges(rows: int, world: int) -> list[range]:
    """The contiguous rows of every worker, equal to within one row; the first workers have the extra row."""
    share, extra = divmod(rows, world)
    starts = [rank * share + min(rank, extra) for rank in range(world + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


@dataclass(frozen=True)
class Share:
    """One worker's share of the global batches of stage 1.

    The rows of an epoch are dealt evenly: into ceil(N / batch) global batches that differ by at most one row, of
    which every worker has a part in proportion to its rows. A last batch of a few rows would be normalised by its own
    few rows, and one of a single row would give its code no gradient at all.

    Args:
        batch: rows of a global batch, at most.
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

    def deal(self, left_W: np.ndarray) -> np.ndarray:
        """Real rows of every worker in each of the global batches that are left of an epoch, int64 [S, W].

        A batch is a function of the rows that are left, so a resumed epoch continues with the batches it would have
        had. After a change of their number, workers have unequal numbers of rows left; where one has more than fit
        into the batches, there are more of them.

        Args:
            left_W: rows that each worker has still to visit.
        """
        left_W, dealt = np.array(left_W, np.int64), []
        while rows := int(left_W.sum()):
            steps = max(_ceil(rows, self.batch), _ceil(int(left_W.max()), self.size))
            now = _ceil(rows, steps)  # the first batches have the extra row, as in `ranges`
            part_W, rest_W = np.divmod(now * left_W, rows)
            largest = np.argsort(-rest_W, kind="stable")[: now - int(part_W.sum())]
            part_W[largest] += 1
            dealt.append(np.minimum(part_W, self.size))
            left_W = left_W - dealt[-1]
        return np.array(dealt, np.int64).reshape(-1, len(left_W))


def even_batch(rows: int, batch: int) -> int:
    """Rows of the largest global batch of an epoch of `rows` rows in as few batches of at most `batch` as possible."""
    return _ceil(rows, _ceil(rows, batch))


def rows_left(epoch: int, visited_n: np.ndarray) -> int:
    """Rows of a worker that are still to be visited in `epoch`, given the visits of each since the start of the run."""
    return int(np.count_nonzero(visited_n <= epoch))


def epoch_plan(
    seed: int,
    epoch: int,
    rows_of_worker: range,
    share: Share,
    left_W: Sequence[int] | np.ndarray,
    visited_n: np.ndarray | None = None,
    first_step: int = 0,
) -> list[PlannedBatch]:
    """The batches of one worker in one epoch, a pure function of its arguments.

    Args:
        epoch: counted from 0.
        left_W: `rows_left` of every worker, in the order of ranks.
        visited_n: visits of each row since the start of the run; rows with more than `epoch` visits are done in
            this epoch and left out. None: no row is done.
        first_step: number of the first batch, for an epoch that is resumed.
    Returns:
        As many batches as `share.deal` makes, numbered from `first_step`. A short or empty batch is padded to
        `share.size` rows with a real row of the range at weight zero. The order of the rows depends on (seed, epoch,
        range) alone: leaving out visited rows does not change the order of the others.
    Raises:
        ValueError: an empty range (without a row to pad with), or a `left_W` that is not that of these workers.
    """
    if not rows_of_worker:
        raise ValueError("a worker needs at least one row, but there are more workers than rows")
    order_n = _permutation(len(rows_of_worker), _LOCAL, seed, epoch, rows_of_worker.start, rows_of_worker.stop)
    if visited_n is not None:
        if visited_n.shape != order_n.shape:
            raise ValueError(f"visited_n has shape {visited_n.shape} for a range of {len(rows_of_worker)} rows")
        order_n = order_n[visited_n[order_n] <= epoch]
    left_W = np.asarray(left_W)
    if left_W.shape != (share.world,) or left_W[share.rank] != len(order_n):
        raise ValueError(f"worker {share.rank} of {share.world} has {len(order_n)} rows left, but left_W is {left_W}")
    plan, start = [], 0
    for step, own in enumerate(share.deal(left_W)[:, share.rank].tolist()):
        rows_B = np.full(share.size, rows_of_worker.start, np.int64)
        rows_B[:own] = order_n[start : start + own] + rows_of_worker.start
        weight_B = (np.arange(share.size) < own).astype(np.float32)
        plan.append(PlannedBatch(first_step + step, rows_B, weight_B))
        start += own
    return plan


@dataclass(frozen=True)
class GlobalBatches(Sequence[np.ndarray]):
    """The global batches of an epoch of stage 2: a permutation of all N rows, cut into batches that differ by at most
    one row.

    It does not depend on the number of workers, so neither does the path of the mapping. Nothing is stored: a batch is
    computed when it is asked for, and a worker's part of the epoch from its own rows.

    Args:
        batch: rows of a global batch, at most.
    """

    seed: int
    epoch: int
    rows: int
    batch: int

    @cached_property
    def cipher(self) -> IndexCipher:
        return IndexCipher(self.rows, _GLOBAL, self.seed, self.epoch)

    def __len__(self) -> int:
        return _ceil(self.rows, self.batch)

    def start(self, step: int) -> int:
        """The place of a batch's first row in the permutation; as in `ranges`, the first batches have the extra row."""
        share, extra = divmod(self.rows, len(self))
        return step * share + min(step, extra)

    def size(self, step: int) -> int:
        """Rows of a batch."""
        return self.start(step + 1) - self.start(step)

    def __getitem__(self, step: int) -> np.ndarray:  # type: ignore[override]
        if not -len(self) <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        step %= len(self)
        return self.cipher.at(np.arange(self.start(step), self.start(step + 1)))

    def __iter__(self) -> Iterator[np.ndarray]:
        together = max(1, _AT_ONCE // self.batch)
        for first in range(0, len(self), together):
            starts = [self.start(step) for step in range(first, min(first + together, len(self)) + 1)]
            row_K = self.cipher.at(np.arange(starts[0], starts[-1]))
            for start, stop in pairwise(starts):
                yield row_K[start - starts[0] : stop - starts[0]]

    def own(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a worker in the order of the epoch, in time and memory of these n rows only.

        Returns:
            The n rows, and for every batch the number of them before it, int64 [len(self) + 1].
        """
        place_n = self.cipher.places(np.arange(rows.start, rows.stop))
        order_n = np.argsort(place_n)
        starts = np.array([self.start(step) for step in range(len(self) + 1)])
        return order_n + rows.start, np.searchsorted(place_n[order_n], starts)


def global_batches(seed: int, epoch: int, rows: int, batch: int) -> GlobalBatches:
    """The global batches of an epoch of stage 2."""
    return GlobalBatches(seed, epoch, rows, batch)


def stratified_plan(
    seed: int, epoch: int, rows: int, batch: int, share: Share, first_step: int = 0
) -> list[PlannedBatch]:
    """This worker's part of an epoch's global batches, which do not depend on the number of workers.

    The rows are cut into as many strata as a batch has rows, and a batch takes one row of each, in the stratum's own
    random order. So every worker finds nearly the same number of a batch's rows among its own contiguous ones, reads no
    others, and every row is visited once. Batches differ by at most one row.

    Args:
        rows: of the whole data set. batch: rows of a global batch, at most.
        share: of this worker; only its rank, world and accumulation count.
        first_step: number of the first batch that is left, for an epoch that is resumed.
    Returns:
        Equally many batches of equally many rows on every worker, padded with its first row at weight zero.
    """
    strata, own = ranges(rows, even_batch(rows, batch)), ranges(rows, share.world)[share.rank]
    steps = len(strata[0])
    fewer = [number for number, stratum in enumerate(strata) if len(stratum) < steps]
    found_n, step_n = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, stratum in enumerate(strata):
        if stratum.stop <= own.start or own.stop <= stratum.start:
            continue
        row_n = stratum.start + _permutation(len(stratum), _STRATA, seed, epoch, number)
        at_n = np.arange(len(stratum))
        if len(stratum) < steps:  # it skips one batch; these are spread over the epoch
            at_n[at_n >= (number - fewer[0]) * steps // len(fewer)] += 1
        mine_n = (own.start <= row_n) & (row_n < own.stop)
        found_n.append(row_n[mine_n])
        step_n.append(at_n[mine_n])
    row_n, at_n = np.concatenate(found_n), np.concatenate(step_n)
    order_n = np.argsort(at_n, kind="stable")
    per_step = np.split(row_n[order_n], np.searchsorted(at_n[order_n], np.arange(1, steps)))
    size = share.accumulation * _ceil(_most_strata(strata, rows, share.world), share.accumulation)
    plan = []
    for step, mine_B in list(enumerate(per_step))[first_step:]:
        rows_B = np.full(size, own.start, np.int64)
        rows_B[: len(mine_B)] = mine_B
        plan.append(PlannedBatch(step, rows_B, (np.arange(size) < len(mine_B)).astype(np.float32)))
    return plan


def _most_strata(strata: list[range], rows: int, world: int) -> int:
    """The most strata that the rows of one worker belong to."""
    starts = np.array([stratum.start for stratum in strata])
    owns = ranges(rows, world)
    last_W = np.searchsorted(starts, [own.stop - 1 for own in owns], side="right")
    first_W = np.searchsorted(starts, [own.start for own in owns], side="right")
    return int((last_W - first_W + 1).max())


def _permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n-1, the same on every machine and with every numpy version.

    NEP 19 guarantees a stable stream for raw bit generators, not for `Generator.permutation`, so raw words of Philox
    are ranked. Ties of 64-bit words, which practically never occur, are resolved by a stable sort.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
