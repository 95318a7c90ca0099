"""Metrics measured together: one pass over the images, one through each extractor, one tally for metrics that share it.

Shapes: B batch, C, H, W channels, height, width, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .features.extractor import build_extractor
from .result import Result
from .spec import METRICS, Metric, Samples
from .tally import Tally

SharedKey = tuple[str | None, Any]  # extractor and kind of tally of metrics that share one


@dataclass(frozen=True)
class Tallied:
    """The tallies of a set of `count` images, by name of the metric; metrics may share one."""

    count: int
    by_metric: dict[str, Tally]

    def merge(self, other: Tallied) -> Tallied:
        """The tallies of both sets together, such as those of two workers."""
        merged: dict[tuple[int, int], Tally] = {}
        for name, tally in self.by_metric.items():
            pair = id(tally), id(other.by_metric[name])
            if pair not in merged:
                merged[pair] = tally.merge(other.by_metric[name])
        return Tallied(
            self.count + other.count,
            {name: merged[id(tally), id(other.by_metric[name])] for name, tally in self.by_metric.items()},
        )


@dataclass(frozen=True)
class Panel:
    """Metrics of samples by name, with the extractors that they need."""

    metrics: dict[str, Samples]
    extractors: Mapping[str, Any]  # `Extractor`, or another function from images or their indices to features

    def tally(self, batches: Iterable[Tensor], first: int = 0) -> Tallied:
        """Tally consecutive images of a set, uint8 [B, C, H, W], or codes [B, D], batch by batch.

        Args:
            first: index in the set of the first of them, for a worker that has a part of the set.
        """
        return self.split(batches, lambda index_B: torch.zeros_like(index_B), 1, first)[0]

    def split(
        self, batches: Iterable[Tensor], part_of: Callable[[Tensor], Tensor], parts: int, first: int = 0
    ) -> list[Tallied]:
        """Tally each of the `parts` of a set, as `tally` does; `part_of` gives the parts of images by their indices."""
        tallies = [{shared_key(needs): needs.tally() for needs in self.metrics.values()} for _ in range(parts)]
        counts, at = [0] * parts, first
        for seen in batches:
            index_B = torch.arange(at, at + len(seen))
            part_B = part_of(index_B)
            features = {name: extract(seen) for name, extract in self.extractors.items()}
            for part in part_B.unique().tolist():
                own_B = (part_B == part).nonzero()[:, 0]
                for (extractor, made), tally in tallies[part].items():
                    looked_at = seen if extractor is None else features[extractor]
                    tallies[part][extractor, made] = tally.update(looked_at[own_B], index_B[own_B])
                counts[part] += len(own_B)
            at += len(seen)
        return [
            Tallied(count, {name: tallied[shared_key(needs)] for name, needs in self.metrics.items()})
            for count, tallied in zip(counts, tallies, strict=True)
        ]

    def compare(
        self,
        reference: Tallied,
        drawn: Tallied,
        sampler: str | None,
        *,
        named: str | None = None,
        training: Tallied | None = None,
    ) -> list[Result]:
        """The values of the metrics for samples `drawn` by `sampler`.

        Args:
            named: name of the reference set; None is the training images.
            training: tallies of the training images, if the reference set is held out. Metrics that need both are left
                out without them.
        """
        comparisons: dict[tuple[Any, ...], Any] = {}
        results = []
        for name, needs in self.metrics.items():
            if needs.held_out and training is None:
                continue
            key = (*shared_key(needs), needs.compare)
            if key not in comparisons:
                before = [training.by_metric[name]] if needs.held_out and training else []
                comparisons[key] = needs.compare(*before, reference.by_metric[name], drawn.by_metric[name])
            found = comparisons[key]
            deviation = None if needs.deviation is None else needs.deviation(found)
            results.append(Result(name, needs.value(found), sampler, named, deviation))
        return results

    def bounded(self) -> Panel:
        """The same panel with the metrics that are also measured of reconstructions and of real images."""
        return self.only(name for name in self.metrics if METRICS[name].bounded)

    def only(self, names: Iterable[str]) -> Panel:
        """The same panel with some of its metrics."""
        metrics = {name: self.metrics[name] for name in names}
        needed = {needs.extractor for needs in metrics.values()}
        return Panel(metrics, {name: extract for name, extract in self.extractors.items() if name in needed})


def build_panel(metrics: Iterable[Metric], device: torch.device | str = "cpu") -> Panel:
    """A panel of those of `metrics` that look at images of samples, with their extractors.

    Raises:
        UserError: the weights of an extractor are invalid. EnvironmentFault: they cannot be fetched.
    """
    chosen = {m.name: m.needs for m in metrics if isinstance(m.needs, Samples) and not m.needs.codes}
    names = dict.fromkeys(needs.extractor for needs in chosen.values() if needs.extractor)
    return Panel(chosen, {name: build_extractor(name, device) for name in names})


def code_panel(metrics: Iterable[Metric]) -> Panel:
    """A panel of those of `metrics` that look at codes."""
    return Panel({m.name: m.needs for m in metrics if isinstance(m.needs, Samples) and m.needs.codes}, {})


def shared_key(needs: Samples) -> SharedKey:
    """What metrics that share a tally have in common."""
    return needs.extractor, needs.tally


def held_out_metrics(metrics: Mapping[str, Samples]) -> list[str]:
    """The names of those that need the training images beside a held-out reference set."""
    return [name for name, needs in metrics.items() if needs.held_out]
