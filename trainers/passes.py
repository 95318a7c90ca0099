"""Passes over a data set whose networks have no state per row: the loop of generators, critics and encoders.

Batches do not depend on the number of workers, and a position alone says where to resume.

Shapes: B rows of this worker's batch, K numbers of a piggyback.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..cluster.placement import Share, ranges, stratified_plan
from ..config.autoencoder import AutoencoderConfig
from ..config.networks import NetworksConfig
from ..config.pixels import PixelsConfig
from ..config.run import Config
from ..datasets.loader import BadRows, Batch, PlannedBatch, batches
from ..datasets.reader import ImageRows
from ..models.comm import rank, world_size
from .bad_steps import BadSteps
from .stage import StageStep


@dataclass(frozen=True)
class Turn:
    """A batch that was read. number: of batches before it, since the run began. scale: factor of the learning rates."""

    epoch: int
    number: int
    batch: Batch
    scale: float


@dataclass(frozen=True)
class Played:
    """What came of a batch: see `StageStep`. facts: numbers of all workers, whose means over an epoch are reported."""

    loss: float | None
    applied: bool
    piggyback_K: Tensor
    facts: Mapping[str, float] = field(default_factory=dict)


def train_passes(
    config: Config,
    keys: NetworksConfig | AutoencoderConfig | PixelsConfig,
    images: ImageRows,
    play: Callable[[Turn, Tensor], Played],
    start: tuple[int, int],
    piggyback: Callable[[], Tensor],
    rates: str,
) -> Iterator[StageStep]:
    """Read batch after batch and let `play` train on it; yields after each.

    Args:
        keys: of the stage. start: (epoch, step) of the first step to take. rates: keys to lower when training diverges.
        piggyback: called once per step for numbers [K], which `play` returns summed over workers.
    Raises:
        UserError: `max_bad_steps` steps in a row were not finite.
    """
    share = Share(keys.batch_size, rank(), world_size(), config.engine.accumulation)
    own = ranges(len(images), share.world)[share.rank]
    bad_rows, bad_steps = BadRows(config.data.max_bad_fraction, len(own)), BadSteps(keys.max_bad_steps, rates)
    for epoch in range(start[0], keys.epochs):
        first = start[1] if epoch == start[0] else 0
        plan, means = stratified_plan(config.seed, epoch, len(images), keys.batch_size, share, first), Means()
        steps = first + len(plan)
        for batch in batches(
            images, plan, threads=config.data.threads, prefetch=config.data.prefetch, max_bad=bad_rows
        ):
            scale = keys.schedule.factor(epoch + batch.step / steps, keys.epochs)

            played = play(Turn(epoch, epoch * steps + batch.step, batch, scale), piggyback())

            means.add(played.facts)
            ends = batch.step + 1 == steps
            done = StageStep(
                epoch,
                batch.step,
                steps,
                played.piggyback_K,
                loss=played.loss,
                rows_B=batch.rows_B[batch.weight_B > 0].tolist(),
                applied=played.applied or played.loss is None,  # a batch without a readable image is no step
                facts=means.values() if ends else {},
                ends_epoch=ends,
            )
            yield done
            bad_steps.count(done)


def rows_in_order(config: Config, images: ImageRows, rows: range) -> Iterator[Batch]:
    """The images of this worker's rows, in their order, in batches as large as those of a step."""
    size = Share(config.batch_size, rank(), world_size()).size
    starts = range(rows.start, rows.stop, size)
    parts = [np.arange(start, min(start + size, rows.stop), dtype=np.int64) for start in starts]
    plan = [PlannedBatch(number, part, np.ones(len(part), np.float32)) for number, part in enumerate(parts)]
    bad_rows, data = BadRows(config.data.max_bad_fraction, len(rows)), config.data
    return batches(images, plan, threads=data.threads, prefetch=data.prefetch, max_bad=bad_rows)


class Means:
    """Means over the steps of an epoch, each over those that have the number."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = defaultdict(list)

    def add(self, facts: Mapping[str, float]) -> None:
        for name, value in facts.items():
            self.found[name].append(value)

    def values(self) -> dict[str, float]:
        return {name: math.fsum(values) / len(values) for name, values in self.found.items()}
