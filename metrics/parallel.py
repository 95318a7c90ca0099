"""Work on several batches at once, each on one core.

Small layers gain little from two threads, and each layer ends in a barrier at which OpenMP's threads spin: on a busy
machine they wait for one another longer than they compute. Whole batches side by side need no barrier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_one_core_each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(function, items)` in order, on as many threads as torch may use, with one torch thread in each.

    A few items are worked on ahead of the one that is asked for, so results need not fit in memory.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "glann-metrics", initializer=partial(torch.set_num_threads, 1))
    upcoming = iter(items)
    try:
        ahead = deque(pool.submit(function, item) for item in islice(upcoming, 2 * threads))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(function, item) for item in islice(upcoming, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # the number also holds for threads that are started later
