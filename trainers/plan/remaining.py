"""Time to the end of a run: of the stage in progress by its pace, of what follows by its operations."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from ...config.run import Config
from ...datasets.fit import held_out_of
from ...datasets.index import Index
from ...errors import EnvironmentFault
from .costs import step_flops, training_costs
from .devices import gpu_of
from .estimate import ASSUMED_UTILISATION, stage_costs
from .evaluation import EvaluationCost, evaluation_cost

WINDOW_S, POINT_S = 900.0, 5.0  # the pace is that of the last quarter of an hour, by a point every few seconds
ASSUMED_CORE = 2e10  # FLOP/s of a core in the evaluation, whose batches are large; small networks train more slowly


@dataclass(frozen=True)
class Work:
    """What a run has to compute. stages: operations by stage, in order. per_image: of a step of stage 1."""

    stages: dict[str, float]
    per_image: int
    evaluation: EvaluationCost

    @classmethod
    def of(cls, config: Config, index: Index, rows: int) -> Work:
        """The work of a whole run on `rows` images."""
        held_out = 0
        with contextlib.suppress(EnvironmentFault):  # an estimate does without what cannot be reached now
            found = held_out_of(config, index)
            held_out = 0 if found is None else found[1].rows
        generator, _ = training_costs(config)
        flops = {name: cost.flops for name, cost in stage_costs(config, rows).items()}
        return cls(flops, step_flops(config), evaluation_cost(config, rows, held_out, generator))


class Remaining:
    """Estimate of the seconds that a run still takes, corrected by what is measured.

    images_per_s: of all workers in stage 1. device: name of the workers' devices.
    """

    def __init__(self, config: Config, work: Work, clock: Callable[[], float] = monotonic) -> None:
        self.config, self.work, self.clock = config, work, clock
        self.images_per_s: float | None = None
        self.workers, self.device = config.cluster.max_workers, ""
        self.stage = ""
        self.points: deque[tuple[float, float]] = deque()

    def restart(self, workers: int) -> None:
        """A group of workers starts: its pace is not that of the one before."""
        self.workers, self.stage = workers, ""
        self.points.clear()

    def advance(self, stage: str, share: float) -> None:
        """So much of a stage is done; a stage that the work does not name is the evaluation."""
        if stage != self.stage:
            self.stage = stage
            self.points.clear()
        now = self.clock()
        if len(self.points) > 1 and now - self.points[-2][0] < POINT_S:
            self.points.pop()
        self.points.append((now, share))
        while len(self.points) > 2 and now - self.points[0][0] > WINDOW_S:
            self.points.popleft()

    def seconds(self) -> float | None:
        """Seconds to the end of the evaluation; None as long as nothing was measured."""
        parts = [self.of_stage(), *(self.of_later(name) for name in self.later())]
        if self.stage in self.work.stages:
            parts.append(self.of_evaluation())
        return None if None in parts else sum(part for part in parts if part is not None)

    def later(self) -> list[str]:
        """The stages that have not begun."""
        names = list(self.work.stages)
        return names[names.index(self.stage) + 1 :] if self.stage in names else []

    def of_stage(self) -> float | None:
        """Seconds to the end of the stage in progress."""
        if not self.points:
            return None
        (began, before), (at, share) = self.points[0], self.points[-1]
        if share >= 1:
            return 0.0
        if share <= before or at <= began:
            return None
        return max(0.0, (1 - share) * (at - began) / (share - before) - (self.clock() - at))

    def of_later(self, name: str) -> float | None:
        """Seconds of a stage that has not begun."""
        rate = self.rate()
        return self.work.stages[name] / rate if rate else None

    def of_evaluation(self) -> float | None:
        """Seconds of the evaluation."""
        rate = self.evaluation_rate()
        return 3600 * self.work.evaluation.hours(self.config, self.workers, rate) if rate else None

    def rate(self) -> float | None:
        """Operations per second of all workers in stage 1."""
        return self.images_per_s * self.work.per_image if self.images_per_s else None

    def evaluation_rate(self) -> float | None:
        """Operations per second of a worker in the evaluation, which is in float32 whatever the training was in."""
        cluster, measured = self.config.cluster, (self.rate() or 0.0) / self.workers
        if gpu := gpu_of(self.device):
            return ASSUMED_UTILISATION * gpu.fp32 * 1e12 * min(1.0, cluster.gpus_per_worker)
        if cluster.gpus_per_worker:
            return measured or None
        return max(measured, ASSUMED_CORE * cluster.cpus_per_worker)
