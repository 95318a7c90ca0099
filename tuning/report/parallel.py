"""Parallel coordinates: one axis per key of the space, one line per finished trial, coloured by its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup

from ...reports.charts import INK, LINE, drawing, spans_magnitudes
from ..space import Dimension, Params
from ..study import StudyConfig
from .charts import RECIPE, apart, crowded
from .leaderboard import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORST = "#8d949c"
ASIDE = -0.16  # height of a line at an axis on which it has no value
LEAST_GAP = 0.1  # between ticks, as a share of the length of an axis
MAX_NAMED = 12  # an axis with more steps than this names only some choices
PER_AXIS, HEIGHT = 1.55, 4.6  # inches


@dataclass(frozen=True)
class Line:
    """A finished trial. role: "best", "recipe" or "trial"."""

    role: str
    label: str
    params: Params
    value: float


@dataclass(frozen=True)
class Scale:
    """Maps values between two bounds to places between 0 and 1 on an axis."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        low, high, at = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self, whole: bool = False) -> list[tuple[float, str]]:
        """Ticks (place, text): both ends, and round numbers between them at least `LEAST_GAP` apart."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        decades = math.log10(self.high / self.low) if self.log else 0
        if self.log and decades >= 0.7:
            between = LogLocator(subs=(1,) if decades > 3 else (1, 2, 5)).tick_values(self.low, self.high)
        else:
            between = MaxNLocator(4, integer=whole).tick_values(self.low, self.high)
        shown = [(0.0, text(self.low)), (1.0, text(self.high))] if self.high > self.low else [(0.5, text(self.low))]
        for value in between:
            if self.low < value < self.high:
                place = self.place(float(value))
                if all(abs(place - other) >= LEAST_GAP for other, _ in shown):
                    shown.append((place, f"{value:g}"))
        return shown


def parallel_coordinates(study: StudyConfig, lines: list[Line], title: str) -> Markup:
    """The chart as SVG. The last axis is the metric, and also the colour scale."""
    space = study.space
    values = [line.value for line in lines]
    scale = Scale(min(values), max(values), spans_magnitudes(values))

    def shade(value: float) -> float:
        """Quality of a value, from 0 (worst) to 1 (best)."""
        return 1 - scale.place(value) if study.minimize else scale.place(value)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        last = len(space)
        for line in sorted(lines, key=lambda line: (line.role != "trial", line.role == "best", shade(line.value))):
            places = [place(dimension, line.params, key) for key, dimension in space.items()]
            across, up = _bent([*places, scale.place(line.value)])
            is_trial = line.role == "trial"
            color = _mixed(shade(line.value)) if is_trial else {"best": LINE, "recipe": RECIPE}[line.role]
            axes.plot(
                across,
                up,
                color=color,
                alpha=crowded(0.75, len(lines)) if is_trial else 1,
                linewidth=1.3 if is_trial else 2.6,
            )
        for at, (key, dimension) in enumerate(space.items()):
            _axis(axes, at, key.replace(".", ".\n"), ticks_of(dimension))
            if any(place(dimension, line.params, key) == ASIDE for line in lines):
                axes.annotate("not searched", (at, ASIDE - 0.02), ha="center", va="top", fontsize=9)
        _axis(axes, last, study.metric.replace("_", "_\n", 1), scale.ticks(), right=True)
        _color_scale(axes, last, study.minimize)
        named = [(scale.place(line.value), line) for line in lines if line.role != "trial"]
        for height, (_, line) in zip(apart([at for at, _ in named], LEAST_GAP), named, strict=True):
            color = LINE if line.role == "best" else RECIPE
            axes.annotate(line.label, (last, height), (58, 0), textcoords="offset points", va="center", color=color)
        axes.set_xlim(-0.45, last + 1.1)
        axes.set_ylim(ASIDE - 0.09, 1.06)
        axes.set_axis_off()

    return drawing(title, (PER_AXIS * (len(space) + 1.9), HEIGHT), draw)


def place(dimension: Dimension, params: Params, key: str) -> float:
    """Place of a trial on the axis of a key; `ASIDE` if it has no value there, or one outside the dimension."""
    code = dimension.encode(params[key]) if key in params else None
    if code is None:
        return ASIDE
    if dimension.choice is not None:
        return float(code) / (len(dimension.choice) - 1)
    return _scale(dimension).place(float(code))


def _scale(dimension: Dimension) -> Scale:
    low, high = dimension.bounds
    return Scale(low, high, dimension.log)


def ticks_of(dimension: Dimension) -> list[tuple[float, str]]:
    """Ticks (place, text) of the axis of a key; of many choices only some are named."""
    if dimension.choice is None:
        return _scale(dimension).ticks(whole=dimension.kind.endswith("integer"))
    last = len(dimension.choice) - 1
    shown = (
        sorted({round(at * last / MAX_NAMED) for at in range(MAX_NAMED + 1)}) if last > MAX_NAMED else range(last + 1)
    )
    return [(at / last, _short(text(dimension.choice[at]))) for at in shown]


def _short(words: str) -> str:
    return words if len(words) <= 16 else f"{words[:15]}…"


def _axis(axes: Axes, at: int, name: str, ticks: Sequence[tuple[float, str]], right: bool = False) -> None:
    """Draw an axis with its name above and its tick labels at the left, or at the right for the last axis."""
    aside, side = (9, "left") if right else (-7, "right")
    axes.plot([at, at], [0, 1], color=INK, linewidth=1)
    axes.annotate(name, (at, 1), (0, 12), textcoords="offset points", ha="center", va="bottom", fontweight="bold")
    for height, words in ticks:
        axes.plot(at, height, "_", color=INK, markersize=7)
        axes.annotate(words, (at, height), (aside, 0), textcoords="offset points", ha=side, va="center", fontsize=10)


def _bent(places: list[float]) -> tuple[list[float], list[float]]:
    """A smooth line through the places, horizontal at each axis so that lines that meet there can be distinguished."""
    steps = 16
    across, up = [], []
    for at, (here, there) in enumerate(pairwise(places)):
        for step in range(steps):
            share = step / steps
            across.append(at + share)
            up.append(here + (there - here) * share * share * (3 - 2 * share))
    return [*across, len(places) - 1.0], [*up, places[-1]]


def _mixed(share: float) -> tuple[float, ...]:
    """Interpolate between the colours of the worst (0) and the best (1) value."""
    from matplotlib.colors import to_rgb

    return tuple(worst + (best - worst) * share for worst, best in zip(to_rgb(WORST), to_rgb(LINE), strict=True))


def _color_scale(axes: Axes, at: int, minimize: bool) -> None:
    """Draw the axis of the metric in the colours of its values."""
    steps = 24
    for step in range(steps):
        middle = (step + 0.5) / steps
        ends = [step / steps, (step + 1) / steps]
        axes.plot([at, at], ends, color=_mixed(1 - middle if minimize else middle), linewidth=5, solid_capstyle="butt")
