"""A judge: measures how far the samples of models are from a fixed set of images, which are read once.

Shapes: B batch, C, H, W channels, height, width, N rows, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config.run import Config
from ..datasets.reader import ImageRows
from ..inference.model import DEFAULT_BATCH, SamplingModel
from .cache import TallyCache
from .panel import Panel, SharedKey, Tallied, build_panel, held_out_metrics, shared_key
from .parallel import on_one_core_each
from .reference import training_images
from .result import FLOOR, HELD_OUT, OWN, RECONSTRUCTION, Result
from .spec import Metric
from .tally import Tally, lowest_priorities
from .team import ALONE, Team

Item = TypeVar("Item")
Codes = Callable[[range], Iterator[Tensor]]  # codes z_BD of consecutive rows, block by block


@dataclass(frozen=True)
class Parts:
    """Tallies of the images of a set in two disjoint parts: some, and all others."""

    some: Tallied
    others: Tallied

    @cached_property
    def whole(self) -> Tallied:
        return self.others.merge(self.some)


@dataclass(frozen=True)
class Judge:
    """Measures how far samples of models are from a fixed set of images.

    Every model draws `samples` images of `seed` and is compared with the same images. In a team all workers call the
    same methods; rank 0 gets the results, the others none.

    real: tallies of the images compared with, in two parts that `tally_images` makes. named: name of their set; None is
        the training images. training: tallies of the training images, if those are held out.
    held_out: the same of held-out images, if `real` are the training images: samples are compared with both.
    """

    panel: Panel
    real: Parts
    samples: int
    seed: int
    named: str | None = None
    training: Tallied | None = None
    held_out: Parts | None = None
    team: Team = ALONE

    def measure(self, model: SamplingModel, sampler: str | None = None) -> list[Result]:
        """Draw once, by `sampler` or the model's own, and compute every metric of the panel."""
        return self.compare(self.tally(model, sampler), sampler or OWN)

    def tally(self, model: SamplingModel, sampler: str | None = None) -> Tallied:
        """The tallies of images that are drawn by `sampler` or the model's own."""
        part = self.team.part(self.samples)
        drawn = self.team.counted(draw(model, part, self.seed, sampler))
        return self.team.merged(self.panel.tally(drawn, part.start))

    def compare(self, drawn: Tallied, sampler: str) -> list[Result]:
        """The metrics of images that were tallied."""
        return self._compare(self.panel, drawn, sampler)

    def measure_reconstructions(self, model: SamplingModel, codes: Codes, rows: int) -> list[Result]:
        """The metrics that reconstructions bound, of as many reconstructions G(z) as `samples`, by random rows.

        Args:
            rows: number of training codes.
        """
        return self.compare_reconstructions(self.tally_reconstructions(model, codes, rows))

    def tally_reconstructions(self, model: SamplingModel, codes: Codes, rows: int) -> Tallied:
        """The tallies of the reconstructions; of none if there are no such metrics."""
        panel = self.panel.bounded()
        if not panel.metrics:
            return Tallied(0, {})
        chosen_N, part = lowest_priorities(rows, self.samples), self.team.part(rows)
        first, stop = torch.searchsorted(chosen_N, torch.tensor([part.start, part.stop])).tolist()
        chosen = (z_BD for block in picked(codes, part, chosen_N[first:stop]) for z_BD in block.split(DEFAULT_BATCH))
        images = self.team.counted(on_model(model, lambda z_BD: channels_first(model.decode(z_BD)), chosen))
        return self.team.merged(panel.tally(images, first))

    def compare_reconstructions(self, tallied: Tallied) -> list[Result]:
        """The metrics of reconstructions that were tallied."""
        return self._compare(self.panel.bounded(), tallied, RECONSTRUCTION)

    def _compare(self, panel: Panel, drawn: Tallied, sampler: str) -> list[Result]:
        if not self.team.leads:
            return []
        real = self.real.whole
        results = panel.compare(real, drawn, sampler, named=self.named, training=self.training)
        if self.held_out is None:
            return results
        return results + panel.compare(self.held_out.whole, drawn, sampler, named=HELD_OUT, training=real)

    def measure_floor(self) -> list[Result]:
        """The metrics that real images bound, of some of a set against the others of it: what no sampler gets below.

        The others are fewer than the images that samples are compared with, and a distance of small sets is larger: the
        floor is not too low.
        """
        panel, results = self.panel.bounded(), list[Result]()
        if not self.team.leads:
            return results
        for real, named in ((self.real, self.named), (self.held_out, HELD_OUT)):
            if real is not None and min(real.some.count, real.others.count) >= 2:
                results += panel.compare(real.others, real.some, FLOOR, named=named)
        return results


def build_judge(
    config: Config,
    images: ImageRows,
    metrics: Iterable[Metric],
    samples: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    training: ImageRows | None = None,
    held_out: ImageRows | None = None,
    team: Team = ALONE,
) -> Judge:
    """A judge for those of `metrics` that need samples, against `images`, which are read once. Collective.

    Args:
        samples: number of images to draw from a model.
        training: the training images, if `images` are held out.
        held_out: held-out images, if `images` are the training images.
    """
    panel = build_panel(metrics, device)
    judge = Judge(panel, tally_images(panel, images, config, samples, team), samples, seed, team=team)
    if held_out is not None:
        return replace(judge, held_out=tally_images(panel, held_out, config, samples, team))
    copies = panel.only(held_out_metrics(panel.metrics))
    if training is None or not copies.metrics:
        return judge
    tallied = tally_images(copies, training, config, samples, team).whole
    return replace(judge, named=HELD_OUT, training=tallied)


def tally_images(panel: Panel, images: ImageRows, config: Config, samples: int, team: Team = ALONE) -> Parts:
    """The tallies of all images of a data set. They are made once, and kept (`cache.py`). Collective.

    Args:
        samples: size of the first part, random images; at most half of the set.
    Returns:
        On rank 0 those of all images; elsewhere of those that this worker has seen.
    """
    rows, chosen = len(images), min(samples, len(images) // 2)
    cache = TallyCache(images.index.fingerprint, rows, chosen, images.shared_store)
    kept = _kept(panel, cache) if team.leads else {}
    [missing, *_] = team.shared([name for name, needs in panel.metrics.items() if shared_key(needs) not in kept])
    parts = [Tallied(chosen, {}), Tallied(rows - chosen, {})]
    if missing:
        fresh, part, chosen_N = panel.only(missing), team.part(rows), lowest_priorities(rows, chosen)
        read = team.counted(training_images(images, part, config))
        seen = fresh.split(read, lambda index_B: (~torch.isin(index_B, chosen_N)).long(), 2, part.start)
        parts = [team.merged(tallied) for tallied in seen]
        if team.leads:
            _keep(fresh, cache, parts)
    for key, tallies in kept.items():
        names = [name for name, needs in panel.metrics.items() if shared_key(needs) == key]
        parts = [
            Tallied(tallied.count, tallied.by_metric | dict.fromkeys(names, tally))
            for tallied, tally in zip(parts, tallies, strict=True)
        ]
    return Parts(*parts)


def _kept(panel: Panel, cache: TallyCache) -> dict[SharedKey, list[Tally]]:
    """The tallies of both parts that are kept, by what metrics share."""
    found = {}
    for needs in panel.metrics.values():
        key, empty = shared_key(needs), needs.tally()
        name = cache.name(panel.extractors[needs.extractor], empty) if needs.extractor else None
        if key not in found and name is not None and (tallies := cache.load(name, empty)) is not None:
            found[key] = tallies
    return found


def _keep(panel: Panel, cache: TallyCache, parts: list[Tallied]) -> None:
    for metric, needs in {shared_key(needs): (metric, needs) for metric, needs in panel.metrics.items()}.values():
        name = cache.name(panel.extractors[needs.extractor], needs.tally()) if needs.extractor else None
        if name is not None:
            cache.save(name, [tallied.by_metric[metric] for tallied in parts])


def draw(model: SamplingModel, part: range, seed: int, sampler: str | None = None) -> Iterator[Tensor]:
    """Consecutive images of a seed, uint8 [B, C, H, W]."""

    def images(index_B: Tensor) -> Tensor:
        return channels_first(model.decode(model.codes(model.noise(index_B, seed, sampler), sampler)))

    yield from on_model(model, images, batches_of(part))


def on_model(model: SamplingModel, function: Callable[[Item], Tensor], batches: Iterable[Item]) -> Iterator[Tensor]:
    """`map(function, batches)`, which decode images: on a CPU side by side, if so many images fit in its memory."""
    side_by_side = model.device.type == "cpu" and model.fitting >= DEFAULT_BATCH * torch.get_num_threads()
    return on_one_core_each(function, batches) if side_by_side else map(function, batches)


def batches_of(part: range) -> tuple[Tensor, ...]:
    """The indices of a part of a set, in batches."""
    return torch.arange(part.start, part.stop).split(DEFAULT_BATCH) if part else ()


def picked(codes: Codes, part: range, chosen_N: Tensor) -> Iterator[Tensor]:
    """The codes of the chosen rows of a part, in their order; one block of the others is in memory at a time."""
    at = part.start
    for z_BD in codes(part):
        inside = chosen_N[(chosen_N >= at) & (chosen_N < at + len(z_BD))]
        if len(inside):
            yield z_BD[inside - at]
        at += len(z_BD)


def channels_first(img_BHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(img_BHWC).permute(0, 3, 1, 2)
