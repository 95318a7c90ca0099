"""Batches of images in the order of a plan, decoded ahead by threads.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .reader import CorruptImage, ImageRows

log = logging.getLogger(__name__)

READS = 32  # requests to storage in flight, at most; at 60 ms a request 500 images/s


class PlannedBatch(NamedTuple):
    """The rows of one step; rows of weight 0 are padding and are not read."""

    step: int
    rows_B: np.ndarray  # int64 global row ids
    weight_B: np.ndarray  # float32, 1 for real rows


class Batch(NamedTuple):
    """The images of a planned batch; a row of weight 0 has an all-black image."""

    step: int
    rows_B: Tensor  # int64
    img_BCHW: Tensor  # uint8
    weight_B: Tensor  # float32


class BadRows:
    """Counts the distinct rows that could not be read, and raises beyond a share of the data set.

    Args:
        max_fraction: share of `rows` that may be bad (`data.max_bad_fraction`).
        rows: number of rows; with several workers that of each, so that the total stays below the share.
    """

    def __init__(self, max_fraction: float, rows: int):
        self._max_fraction, self._limit = max_fraction, max_fraction * rows
        self._faults: dict[int, str] = {}

    @property
    def rows(self) -> list[int]:
        """The bad rows so far, sorted."""
        return sorted(self._faults)

    def add(self, fault: CorruptImage) -> None:
        """Record a bad row. Raises UserError once there are too many."""
        if fault.row in self._faults:
            return
        self._faults[fault.row] = str(fault)
        if len(self._faults) > self._limit:
            raise UserError(
                f"{fault} ({len(self._faults)} bad images, data.max_bad_fraction={self._max_fraction:g} allows "
                f"{int(self._limit)}; check the data set with `glann data verify` or raise data.max_bad_fraction)"
            ) from fault
        log.warning("%s; skipped", fault)


def batches(
    images: ImageRows,
    plan: Iterable[PlannedBatch],
    *,
    threads: int,
    prefetch: int,
    max_bad: BadRows,
    pinned: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of `plan` in order, with `prefetch` of them decoded in the background.

    Images in object storage are read by threads of their own, so that up to `READS` requests are in flight however few
    threads decode. An image that cannot be read gets weight 0 and is counted by `max_bad`.  Errors of the threads are
    raised at the batch they belong to.  If the iterator is closed or dropped early, its threads have ended before
    `close()` returns.

    Args:
        pinned: decode into page-locked memory, from which a GPU copies without help of the host.
    Raises:
        UserError: more bad images than `max_bad` allows.
        EnvironmentFault: storage failed after all retries.
    """
    pools = _Pools(images, threads)
    upcoming = iter(plan)
    try:
        ahead = deque(_start(pools, images, planned, threads, pinned) for planned in islice(upcoming, prefetch))
        while ahead:
            batch = _collect(*ahead.popleft(), max_bad)
            ahead.extend(_start(pools, images, planned, threads, pinned) for planned in islice(upcoming, 1))
            yield batch
    finally:
        pools.close()


class _Pools:
    """Threads that decode, and others that read where a read waits for a request; each has a task in flight."""

    def __init__(self, images: ImageRows, threads: int) -> None:
        self.decoding = ThreadPoolExecutor(threads, thread_name_prefix="glann-decode")
        waits = isinstance(images, ImageRows) and images.waits
        self.reading = ThreadPoolExecutor(READS, thread_name_prefix="glann-read") if waits else None

    def read(self, images: ImageRows, row: int) -> Future[bytes] | None:
        """Start to read an image; None leaves that to the thread that decodes it, or it is decoded already."""
        if self.reading is None or images.is_decoded(row):
            return None
        return self.reading.submit(images.read, row)

    def close(self) -> None:
        """Cancel what has not begun, and wait for the rest: first for the reads, which the decoding waits for."""
        if self.reading is not None:
            self.reading.shutdown(wait=True, cancel_futures=True)
        self.decoding.shutdown(wait=True, cancel_futures=True)


_Faults = list[CorruptImage]
_Reads = dict[int, Future[bytes] | None]  # by place in the batch


def _start(
    pools: _Pools, images: ImageRows, planned: PlannedBatch, threads: int, pinned: bool
) -> tuple[PlannedBatch, Tensor, list[Future[_Faults]]]:
    """Start to read and decode a batch, whose decoding is split evenly over the threads."""
    index = images.index
    shape = (len(planned.rows_B), index.channels, index.resolution, index.resolution)
    img_BCHW = torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)
    places = np.flatnonzero(planned.weight_B)
    reads = {int(place): pools.read(images, int(planned.rows_B[place])) for place in places}
    parts = [part.tolist() for part in np.array_split(places, threads) if len(part)]
    submit, img = pools.decoding.submit, img_BCHW.numpy()
    return planned, img_BCHW, [submit(_decode, images, planned.rows_B, img, part, reads) for part in parts]


def _decode(images: ImageRows, rows_B: np.ndarray, img_BCHW: np.ndarray, places: list[int], reads: _Reads) -> _Faults:
    """Decode the images at `places` of a batch; return the faults of unreadable rows."""
    faults = []
    for place in places:
        read, row = reads.pop(place), int(rows_B[place])  # its bytes are let go as soon as it is decoded
        try:
            img_BCHW[place] = images.decode(row) if read is None else images.decode(row, read.result())
        except CorruptImage as fault:
            faults.append(fault)
    return faults


def _collect(planned: PlannedBatch, img_BCHW: Tensor, parts: list[Future[_Faults]], max_bad: BadRows) -> Batch:
    """Wait for a batch and set the weight of its bad rows to 0."""
    weight_B = np.array(planned.weight_B, np.float32)
    for part in parts:
        for fault in part.result():
            max_bad.add(fault)
            weight_B[planned.rows_B == fault.row] = 0
    rows_B = np.array(planned.rows_B, np.int64)
    return Batch(planned.step, torch.from_numpy(rows_B), img_BCHW, torch.from_numpy(weight_B))
