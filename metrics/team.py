"""Evaluation by several workers: each works on its part of the images, and rank 0 gets the tallies of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from ..cluster.placement import ranges
from ..models.comm import rank, world_size
from .panel import Tallied

Item = TypeVar("Item")

# A worker may be behind by as long as its part takes. The end of one ends the others' wait: the connection closes, and
# Ray ends the group.
PATIENCE = timedelta(hours=24)


def counting(report: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """An `on_images` that reports (images so far, images in all); `total` is raised if there are more."""
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        report(done, max(done, total))

    return count


@dataclass(frozen=True)
class Team:
    """The workers that evaluate together; by default this process alone.

    group: where items are gathered, in main memory. on_images: called with the number of images of every batch that
    this worker begins.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    on_images: Callable[[int], None] = lambda count: None

    @classmethod
    def of_all(cls, on_images: Callable[[int], None] = lambda count: None) -> Team:
        """All workers of the process group. Collective."""
        if world_size() == 1:
            return cls(on_images=on_images)
        return cls(rank(), world_size(), dist.new_group(backend="gloo", timeout=PATIENCE), on_images)

    @property
    def leads(self) -> bool:
        """Whether this worker gets the tallies of all."""
        return self.rank == 0

    def part(self, count: int) -> range:
        """This worker's part of `count` images, rows or samples."""
        return ranges(count, self.world)[self.rank]

    def counted(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches, reported to `on_images`."""
        for batch in batches:
            self.on_images(len(batch))
            yield batch

    def collected(self, item: Item) -> list[Item]:
        """The items of all workers by rank, on rank 0; none elsewhere. Collective."""
        if self.world == 1:
            return [item]
        items: list[Item | None] | None = [None] * self.world if self.leads else None
        dist.gather_object(item, items, 0, self.group)
        return [] if items is None else [item for item in items if item is not None]

    def shared(self, item: Item) -> list[Item]:
        """The items of all workers by rank, on all of them. Collective."""
        if self.world == 1:
            return [item]
        items: list[Item | None] = [None] * self.world
        dist.all_gather_object(items, item, self.group)
        return [item for item in items if item is not None]

    def merged(self, tallied: Tallied) -> Tallied:
        """The tallies of all workers together, on rank 0; its own on each other. Collective."""
        parts = self.collected(tallied)
        return reduce(Tallied.merge, parts) if parts else tallied


ALONE = Team()
