"""Charts as inline SVG in the text colour of the page, for light and dark mode."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # placeholder that is replaced by the text colour of the page
LINE = "#3f7fd9"  # legible in light and dark mode
MAX_POINTS = 1500
Point = TypeVar("Point")
_XML_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*"')


def drawing(title: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Markup:
    """SVG element of what `draw` puts on a figure of `size` inches. Titles must be unique on a page."""
    import matplotlib
    from matplotlib.figure import Figure  # the object interface needs no display and no global state

    settings: Any = {  # Any: matplotlib types rc keys as literals
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.parse_math": False,  # keep dollar signs in names
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_for_the_page(buffer.getvalue(), title))


def line_chart(steps: Sequence[int], values: Sequence[float], *, title: str, label: str, log: bool = False) -> Markup:
    """Chart of values over steps (faint) with their running mean over 2% of the points (bold)."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        some_steps, some_values = thinned(steps), thinned(values)
        axes.plot(some_steps, some_values, color=LINE, alpha=0.3, linewidth=1)
        axes.plot(some_steps, running_mean(some_values, max(1, len(some_values) // 50)), color=LINE, linewidth=2)
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if log and spans_magnitudes(values):
            logarithmic(axes)
        axes.grid(axis="y", color=INK, alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)

    return drawing(title, (6.4, 3.0), draw)


def spans_magnitudes(values: Sequence[float]) -> bool:
    """Whether the values need a logarithmic axis: all positive, with a ratio above 20."""
    return min(values) > 0 and max(values) / min(values) > 20


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers as tick labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at every position, of fewer at the start."""
    total, means = 0.0, []
    for at, value in enumerate(values):
        total += value - (values[at - window] if at >= window else 0.0)
        means.append(total / min(at + 1, window))
    return means


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` of the points, evenly spaced, including the last, to keep the page small."""
    stride = -(-len(points) // MAX_POINTS)
    return list(points[::-1][::stride][::-1]) if stride > 1 else list(points)


def _for_the_page(svg: str, title: str) -> str:
    svg = _XML_HEAD.sub("", svg)
    svg = _SIZE.sub(lambda match: match[1] or "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return svg.replace(INK, "currentColor")
