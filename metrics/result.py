"""Results of metrics, and their keys.

Where values are stored by name (MLflow, summary.json, ledgers, tags), a result has a key,
`[SAMPLER/]METRIC[:REFERENCE]`: the metric alone for the run's own sampler or for none (`fd_lite0`, `l1`), the sampler
in front otherwise (`gaussian/fd_lite0`), and behind it the reference set, unless that is the training images
(`fd_lite0:held-out`). Only this file depends on this format.

The table of metrics is imported where it is looked into: listing stored values needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ..config.samplers import SAMPLERS

OWN = "own"  # the run's own sampler, of whatever kind
BASELINE = "gaussian"  # measured beside the run's own sampler
RECONSTRUCTION = "reconstruction"  # the training codes themselves, in place of a sampler's
FLOOR = "real"  # some images of the reference set, measured against the others of it
TRAINING = "training"  # reference set of the images that the model was trained on
HELD_OUT = "held-out"  # reference set of images that the model was not trained on
OLD_SUFFIX = "_glo"  # of the baseline, in keys of the former format
_WORD = re.compile(r"[a-z0-9][a-z0-9-]*")

Value = TypeVar("Value")


class SamplerLabel(NamedTuple):
    """The display text of a sampler: suffix of a metric's title, and description of its samples."""

    title: str
    meaning: str


SAMPLER_LABELS = {
    BASELINE: SamplerLabel("Gaussian (GLO baseline)", "samples drawn from a Gaussian over the codes, without stage 2"),
    RECONSTRUCTION: SamplerLabel("reconstructions", "of reconstructions: samples of this stage 1 get hardly better"),
    FLOOR: SamplerLabel("real images", "of real images against the others: nothing gets better"),
}


def sampler_label(sampler: str) -> SamplerLabel:
    """The display text of a sampler of any kind."""
    return SAMPLER_LABELS.get(sampler, SamplerLabel(sampler, f"samples drawn by {sampler}"))


class Key(NamedTuple):
    """The parts of a key."""

    metric: str
    sampler: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Result:
    """A value of a metric.

    sampler: `OWN`, or the kind of the sampler of the images, or `RECONSTRUCTION` or `FLOOR`; None for metrics without
        samples.
    reference: name of the set of images that it was measured against; None is the training images.
    deviation: standard deviation of the value, of the metrics that know it.
    """

    metric: str
    value: float
    sampler: str | None = None
    reference: str | None = None
    deviation: float | None = None

    @property
    def against(self) -> str:
        """The name of the set of images that it was measured against."""
        return self.reference or TRAINING


def to_key(metric: str, sampler: str | None = None, reference: str | None = None) -> str:
    """The key of a result."""
    named = metric if sampler in (None, OWN) else f"{sampler}/{metric}"
    return f"{named}:{reference}" if reference else named


def from_key(key: str) -> Key:
    """The parts of a key; for a key without a known metric, the key itself as metric."""
    old = key.removesuffix(OLD_SUFFIX)
    if old != key and _of_samples(old):
        return Key(old, BASELINE)
    named, _, reference = key.partition(":")
    sampler, _, metric = named.rpartition("/")
    whole = _of_samples(metric) and bool(_WORD.fullmatch(reference)) == (":" in key)
    if whole and sampler and _WORD.fullmatch(sampler):
        return Key(metric, sampler, reference or None)
    if whole and named == metric:
        return Key(metric, OWN, reference or None)
    return Key(key)


def canonical_keys(stored: Mapping[str, Value]) -> dict[str, Value]:
    """Convert stored values to current keys."""
    old = {key for key in stored if key.endswith(OLD_SUFFIX) or key.startswith(f"{OWN}/")}
    return {to_key(*from_key(key)) if key in old else key: value for key, value in stored.items()}


def names_sampler(key: str) -> bool:
    """Whether a current key is that of a sampler other than the run's own."""
    return "/" in key


def by_key(results: Iterable[Result]) -> dict[str, float]:
    """Results by key, as they are stored."""
    return {to_key(result.metric, result.sampler, result.reference): result.value for result in results}


def deviations(results: Iterable[Result]) -> dict[str, float]:
    """The deviations of those results that have one, by key."""
    known = [result for result in results if result.deviation is not None]
    return {to_key(result.metric, result.sampler, result.reference): float(result.deviation or 0.0) for result in known}


def known_results() -> list[str]:
    """Every possible key of a result: of every kind of sampler, and against training and held-out images."""
    from .spec import METRICS

    keys = list(METRICS)
    for reference in (None, HELD_OUT):
        for name, metric in METRICS.items():
            if not metric.of_samples:
                continue
            samplers = [OWN, *SAMPLERS, *((RECONSTRUCTION, FLOOR) if metric.bounded else ())]
            keys += [to_key(name, sampler, reference) for sampler in samplers]
    return list(dict.fromkeys(keys))


def _of_samples(metric: str) -> bool:
    from .spec import METRICS

    return metric in METRICS and METRICS[metric].of_samples
