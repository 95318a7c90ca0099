"""Measurements of a run while it trains: samples of its networks at the end of an epoch, drawn by the workers.

The workers pause their training to draw, as on their own devices there is no capacity beside it:
`evaluation.interim_samples` images by the sampler that the checkpoint has, which is a Gaussian over the codes in stage
1, and there as many reconstructions. They are compared with the real images while the training goes on. Those are read
at the first measurement, and kept for the evaluation at the end. All of it is a function of the networks: neither the
number of workers nor a restart changes the numbers.

Shapes: B rows of a block, D latent dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from ...cluster.checkpoints.best import Best
from ...cluster.latents import LatentTable
from ...config.run import Config
from ...datasets.reader import ImageRows
from ...metrics.evaluate import CODES_AT_ONCE
from ...metrics.judge import Judge, tally_images
from ...metrics.panel import build_panel
from ...metrics.result import BASELINE, OWN, Result
from ...metrics.spec import Metric, Samples, best_metric, measured_with
from ...metrics.team import Team
from ..sampler import MAPPING
from ..stage import StageInfo, State
from .evaluation import gaussian_of, model_of

# Parts of a measurement, and phases of the workers.
REAL, SAMPLES, RECONSTRUCTIONS = "measuring real images", "measuring samples", "measuring reconstructions"


class Interim:
    """Measurements by one group of workers; all of them call the same methods."""

    def __init__(self, config: Config, images: ImageRows, device: torch.device) -> None:
        self.config, self.images, self.device = config, images, device
        self.metric = best_metric(config.evaluation.extractor, config.evaluation.best)

    def due(self, stage: StageInfo, epochs: int) -> bool:
        """Whether samples are measured after so many epochs of a stage."""
        every = self.config.evaluation.every_epochs
        return every is not None and (epochs % every == 0 or epochs == stage.epochs)

    @cached_property
    def judge(self) -> Judge:
        """The judge of all measurements, with the real images that the evaluation at the end compares with, too."""
        evaluation, team = self.config.evaluation, Team.of_all()
        panel = build_panel(interim_metrics(self.config, self.metric), self.device)
        real = tally_images(panel, self.images, self.config, evaluation.samples, team)
        return Judge(panel, real, evaluation.interim_samples, seed=0, team=team)

    def measure(
        self, networks: Mapping[str, State], latents: LatentTable, begin: Callable[[str], bool]
    ) -> Callable[[], list[Result]] | None:
        """Draw samples of these networks. Collective.

        Args:
            latents: the codes of this worker's rows.
            begin: called with the name of each part; whether it is to be measured, the same on all workers.
        Returns:
            Compares what was drawn with the real images, on the CPU and on rank 0, elsewhere with no results; None if
            the measurement was given up.
        """
        rows, codes = len(self.images), codes_of(latents)
        if not begin(REAL):
            return None
        judge = self.judge
        if not begin(SAMPLES):
            return None
        if MAPPING in networks or not self.config.has_codes:
            drawn = judge.tally(model_of(self.config, networks, None, self.device), None)
            return lambda: judge.compare(drawn, OWN)
        model = model_of(self.config, networks, gaussian_of(codes, rows, judge.team), self.device)
        drawn = judge.tally(model, BASELINE)
        if not begin(RECONSTRUCTIONS):
            return None
        rebuilt = judge.tally_reconstructions(model, codes, rows)
        return lambda: judge.compare(drawn, BASELINE) + judge.compare_reconstructions(rebuilt)

    def best_of(self, results: list[Result], stage: str, epoch: int, step: int) -> Best | None:
        """What the checkpoint of `step` measured by the metric that decides; None if that was not finite."""
        [result] = [one for one in results if one.metric == self.metric.name and one.sampler in (OWN, BASELINE)]
        if not math.isfinite(result.value):
            return None
        return Best(
            step=step,
            metric=result.metric,
            better=self.metric.better,
            value=result.value,
            sampler=self.config.sampler.kind if result.sampler == OWN else BASELINE,
            samples=self.config.evaluation.interim_samples,
            stage=stage,
            epoch=epoch,
        )


def entry_of(stage: str) -> str:
    """The name in the journal, and in MLflow, of what is measured in a stage: an epoch has an entry of its own."""
    return f"{stage}/measured"


def interim_metrics(config: Config, best: Metric) -> list[Metric]:
    """The metrics that are measured while a run trains: those of every run that compare samples, and the best's."""
    every = [
        metric
        for metric in measured_with(config.evaluation.extractor)
        if isinstance(metric.needs, Samples) and not metric.held_out
    ]
    return every if best in every else [*every, best]


def codes_of(latents: LatentTable) -> Callable[[range], Iterator[Tensor]]:
    """The codes z_BD of a worker's own rows, block by block."""

    def codes(rows: range) -> Iterator[Tensor]:
        for start in range(rows.start, rows.stop, CODES_AT_ONCE):
            yield latents.gather(range(start, min(start + CODES_AT_ONCE, rows.stop)))

    return codes
