"""Figures of a run as text: all of them, and those that a reader needs first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..metrics.result import BASELINE, HELD_OUT, OWN, TRAINING, from_key, sampler_label, to_key
from ..metrics.spec import METRICS, Samples
from .limits import BOUNDS, limits
from .page import number

NONE: Mapping[str, float] = MappingProxyType({})


def metric_rows(metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """Rows (title, formatted value, meaning) of the stored metrics."""
    rows = []
    for key, value in metrics.items():
        if not isinstance(value, int | float):
            continue
        name, sampler, reference = from_key(key)
        if (metric := METRICS.get(name)) is None:
            rows.append((key.replace("_", " "), number(value), ""))
            continue
        title, meaning = metric.title, metric.explained()
        if sampler not in (None, OWN):
            words, drawn = sampler_label(sampler)
            title, meaning = f"{title}, {words}", f"{meaning}; {drawn}"
        if reference is not None:
            title = f"{title}, {reference} images"
        meaning = f"{meaning}; against {reference or TRAINING} images"
        rows.append((title, metric.format.format(value), meaning))
    return rows


def figure_rows(
    metrics: Mapping[str, float], deviations: Mapping[str, float] = NONE
) -> list[tuple[str, str, str, str]]:
    """Rows (title, formatted value, bounds, meaning): `metric_rows` with the bounds beside the figure they bound."""
    bounded = {one.key: one for one in limits(metrics)}
    beside = {to_key(name, bound, reference) for name, _, reference in map(from_key, bounded) for bound in BOUNDS}
    rows = []
    for key, value in metrics.items():
        if key in beside or not isinstance(value, int | float):
            continue
        [(title, text, meaning)] = metric_rows({key: value})
        if isinstance(deviation := deviations.get(key), int | float) and (metric := METRICS.get(from_key(key).metric)):
            text += f" ± {metric.format.format(deviation).lstrip('+')}"
        rows.append((title, text, bounded[key].beside() if key in bounded else "", meaning))
    return rows


def main_rows(metrics: Mapping[str, float], deviations: Mapping[str, float] = NONE) -> list[tuple[str, str, str, str]]:
    """`figure_rows` of what counts: of samples the figures against one reference set, of the baseline its distance."""
    reference = reference_of(metrics)
    shown = {key: value for key, value in metrics.items() if _counts(key, reference)}
    rows = figure_rows(shown, deviations)
    return [(row[0].removesuffix(f", {HELD_OUT} images"), *row[1:]) for row in rows]


def reference_of(metrics: Mapping[str, float]) -> str | None:
    """The reference set to show figures against: held-out images where a run was measured against them."""
    return HELD_OUT if any(from_key(key).reference == HELD_OUT for key in metrics) else None


def _counts(key: str, reference: str | None) -> bool:
    name, sampler, against = from_key(key)
    metric = METRICS.get(name)
    compared = metric is not None and isinstance(metric.needs, Samples) and not metric.needs.codes
    if compared and against != reference:
        return False
    return sampler != BASELINE or (metric is not None and metric.bounded)
