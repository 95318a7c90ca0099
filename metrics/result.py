"""Results of metrics, and their keys.

Where values are stored by name (MLflow, summary.json, ledgers, tags), a result has a key: the metric for the
run's own sampler or for none (`fd_lite0`, `l1`), prefixed with the sampler otherwise (`gaussian/fd_lite0`). Only
`to_key` and `from_key` depend on this format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from .spec import METRICS

OWN = "imle"  # the default sampler of a run
OLD_SUFFIX, OLD_SAMPLER = "_glo", "gaussian"  # the baseline in keys of the former format
_SAMPLER = re.compile(r"[a-z0-9][a-z0-9-]*")

Value = TypeVar("Value")


class SamplerLabel(NamedTuple):
    """The display text of a sampler: suffix of a metric's title, and description of its samples."""

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
    """A value of a metric. sampler: kind of the sampler of the images; None for reconstructions."""

    metric: str
    value: float
    sampler: str | None = None


def to_key(metric: str, sampler: str | None, own: str = OWN) -> str:
    """The key of a result; `own` is the run's own sampler."""
    return metric if sampler in (None, own) else f"{sampler}/{metric}"


def from_key(key: str, own: str = OWN) -> tuple[str, str | None]:
    """(metric, sampler) of a key; for a key without a known metric, the key itself and None."""
    old = key.removesuffix(OLD_SUFFIX)
    if old != key and _of_samples(old):
        return old, OLD_SAMPLER
    sampler, _, metric = key.rpartition("/")
    if _of_samples(metric) and _SAMPLER.fullmatch(sampler):
        return metric, sampler
    return key, own if _of_samples(key) else None


def canonical_keys(stored: Mapping[str, Value]) -> dict[str, Value]:
    """Convert stored values to current keys."""
    return {to_key(*from_key(key)): value for key, value in stored.items()}


def by_key(results: Iterable[Result], own: str = OWN) -> dict[str, float]:
    """Results by key, as they are stored."""
    return {to_key(result.metric, result.sampler, own): result.value for result in results}


def known_results() -> list[str]:
    """Every possible key of a result."""
    others = [sampler for sampler in SAMPLER_LABELS if sampler != OWN]
    return [*METRICS, *(to_key(name, sampler) for sampler in others for name in METRICS if _of_samples(name))]


def _of_samples(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].of_samples
