"""A measured number: of which metric, and of which sampler's images.

Where numbers are stored by name (MLflow, summary.json, ledgers, tags) a result has a key. The metric alone names
the result of the run's own sampler, or of none (`fd_lite0`, `l1`); another sampler stands in front of it
(`gaussian/fd_lite0`). `to_key` and `from_key` are the only places that know this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from .spec import METRICS

OWN = "imle"  # the sampler of a run, which `glann sample` draws with
OLD_SUFFIX, OLD_SAMPLER = "_glo", "gaussian"  # how keys named the baseline before samplers had names
_SAMPLER = re.compile(r"[a-z0-9][a-z0-9-]*")

Value = TypeVar("Value")


class SamplerLabel(NamedTuple):
    """A sampler in words: what follows a metric's title, and its meaning, where it is not the run's own."""

    title: str
    meaning: str


SAMPLER_LABELS = {
    "imle": SamplerLabel("IMLE", "samples drawn by IMLE"),
    "gaussian": SamplerLabel(
        "Gaussian (GLO baseline)", "samples drawn from a Gaussian over the codes, without stage 2"
    ),
}


@dataclass(frozen=True)
class Result:
    """A value of a metric. sampler: what drew the images; None where none were drawn, as for a reconstruction."""

    metric: str
    value: float
    sampler: str | None = None


def to_key(metric: str, sampler: str | None, own: str = OWN) -> str:
    """The key of a result. `own`: the run's own sampler."""
    return metric if sampler in (None, own) else f"{sampler}/{metric}"


def from_key(key: str, own: str = OWN) -> tuple[str, str | None]:
    """(metric, sampler) of a key; a key that names no metric of the table is one itself, of no sampler."""
    old = key.removesuffix(OLD_SUFFIX)
    if old != key and _of_samples(old):
        return old, OLD_SAMPLER
    sampler, _, metric = key.rpartition("/")
    if _of_samples(metric) and _SAMPLER.fullmatch(sampler):
        return metric, sampler
    return key, own if _of_samples(key) else None


def canonical_keys(stored: Mapping[str, Value]) -> dict[str, Value]:
    """Stored values under the keys of today."""
    return {to_key(*from_key(key)): value for key, value in stored.items()}


def by_key(results: Iterable[Result], own: str = OWN) -> dict[str, float]:
    """Results as they are stored."""
    return {to_key(result.metric, result.sampler, own): result.value for result in results}


def known_results() -> list[str]:
    """Every key that a result of today can have."""
    others = [sampler for sampler in SAMPLER_LABELS if sampler != OWN]
    return [*METRICS, *(to_key(name, sampler) for sampler in others for name in METRICS if _of_samples(name))]


def _of_samples(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].of_samples
