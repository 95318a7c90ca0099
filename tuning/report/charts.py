"""Charts of a study: loss curves, the value of every finished trial, and the best of so many of them.

In all of them the best trial is blue and bold, the base recipe orange, and stopped or failed trials are faint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from ...reports.charts import INK, LINE, drawing, logarithmic, spans_magnitudes, thinned
from ..ledger import State

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]
RECIPE = "#d9822b"  # as legible as the blue, for the base recipe
WIDE = (9.6, 4.2)  # inches
LABEL_GAP = 0.055  # of the height of the axes, between labels


@dataclass(frozen=True)
class Curve:
    """The losses of a trial over the epochs. role: selects colour and width."""

    role: str  # "best", "recipe" or "trial"
    state: State
    label: str
    epochs: Sequence[float]
    losses: Sequence[float]


def loss_curves(curves: list[Curve], title: str) -> Markup:
    """Chart of the losses of all trials; a dot marks where one ended early."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "epoch", "loss")
        for curve in sorted(curves, key=lambda curve: ("trial", "recipe", "best").index(curve.role)):
            epochs, losses = thinned(curve.epochs), thinned(curve.losses)
            color, alpha, width = _look(curve.role, curve.state)
            alpha = alpha if curve.label else crowded(alpha, len(curves))
            dashes = (0, (2, 1.5)) if curve.state == "running" else "solid"
            axes.plot(epochs, losses, color=color, alpha=alpha, linewidth=width, linestyle=dashes)
            if curve.state in ("stopped", "failed") or len(epochs) == 1:
                axes.plot(epochs[-1], losses[-1], "o", color=color, alpha=min(2 * alpha, 1), markersize=3.5)
        if spans_magnitudes([loss for curve in curves for loss in curve.losses]):
            logarithmic(axes)
        _label(axes, [(c.epochs[-1], c.losses[-1], c.label, _look(c.role, c.state)[0]) for c in curves if c.label])

    return drawing(title, WIDE, draw)


def values_over_trials(
    values: dict[int, float], base: int, minimize: bool, metric: str, title: str, best_label: str
) -> Markup:
    """Chart of the value of every finished trial over its number, with the best value so far as a line."""
    sign = 1 if minimize else -1
    numbers = sorted(values)

    def better(best: int, new: int) -> int:
        return new if sign * values[new] < sign * values[best] else best

    so_far = list(accumulate(numbers, better))
    best = so_far[-1]

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "trial", metric)
        axes.step(numbers, [values[number] for number in so_far], where="post", color=LINE, linewidth=2)
        others = [number for number in numbers if number not in (best, base)]
        axes.plot(others, [values[number] for number in others], "o", color=LINE, alpha=0.45, markersize=5)
        labels = []
        if base in values:
            axes.axhline(values[base], color=RECIPE, linewidth=1, linestyle=(0, (4, 3)))
            axes.plot(base, values[base], "o", color=RECIPE, markersize=8)
            labels.append((numbers[-1], values[base], "recipe", RECIPE))
        if best != base:
            axes.plot(best, values[best], "o", color=LINE, markersize=8)
            labels.append((numbers[-1], values[best], best_label, LINE))
        if spans_magnitudes(list(values.values())):
            logarithmic(axes)
        _label(axes, labels)

    return drawing(title, WIDE, draw)


def best_of_so_many(low_K: Values, median_K: Values, high_K: Values, metric: str, title: str) -> Markup:
    """Chart of the best of k trials over k: the median as a line, and what eight draws in ten are between."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "trials that are made", metric)
        count_K = np.arange(1, len(median_K) + 1)
        shown_K = [np.where(np.isfinite(values), values, np.nan) for values in (low_K, median_K, high_K)]
        axes.fill_between(count_K, shown_K[0], shown_K[2], color=LINE, alpha=0.18, linewidth=0)
        axes.plot(count_K, shown_K[1], color=LINE, linewidth=2, marker="o", markersize=3)
        if spans_magnitudes(np.concatenate(shown_K)[np.isfinite(np.concatenate(shown_K))].tolist()):
            logarithmic(axes)

    return drawing(title, WIDE, draw)


def _axes(figure: Figure, across: str, up: str) -> Axes:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=INK, alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.015)
    return axes


def _look(role: str, state: State) -> tuple[str, float, float]:
    """Colour, opacity and width of a line."""
    if role == "best":
        return LINE, 1.0, 2.6
    if role == "recipe":
        return RECIPE, 1.0, 2.2
    return (LINE, 0.5, 1.3) if state in ("finished", "running") else (INK, 0.28, 1.1)


def _label(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write labels (x, y, text, colour) to the right of their points, moved apart where they would overlap."""
    from matplotlib.transforms import blended_transform_factory

    axes.set_ylim(axes.get_ylim())  # fix the scale: labels are placed by it
    to_axes = axes.transData + axes.transAxes.inverted()
    beside = blended_transform_factory(axes.transData, axes.transAxes)
    heights = apart([float(to_axes.transform((x, y))[1]) for x, y, _, _ in labels], LABEL_GAP)
    for (x, _, text, color), height in zip(labels, heights, strict=True):
        axes.annotate(
            text, (x, height), xycoords=beside, xytext=(7, 0), textcoords="offset points", va="center", color=color
        )


def crowded(alpha: float, count: int) -> float:
    """Opacity of one of `count` lines: the more lines, the fainter each."""
    return alpha * min(1.0, math.sqrt(24 / count))


def apart(places: list[float], gap: float) -> list[float]:
    """The places, moved up where needed so that neighbours are at least `gap` apart."""
    moved = list(places)
    lowest = -float("inf")
    for at in sorted(range(len(places)), key=places.__getitem__):
        moved[at] = lowest = max(places[at], lowest + gap)
    return moved
