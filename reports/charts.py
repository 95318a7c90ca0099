"""Charts as inline SVG that take their ink from the page, so they are right in light and in dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # drawn by matplotlib, then replaced by the page's text colour
LINE = "#3f7fd9"  # legible on white and on near-black
MAX_POINTS = 1500
_XML_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*"')


def drawing(title: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Markup:
    """An SVG element of what `draw` puts on a figure of `size` inches. Titles on one page have to differ."""
    import matplotlib
    from matplotlib.figure import Figure  # the object interface: no window system, no global state

    settings: Any = {  # matplotlib types each of its 300 keys
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.parse_math": False,  # a dollar in a name is a dollar
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
    """The values over the steps, faint, and their running mean over 2% of the steps, bold."""

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
    """Whether the values are better told apart on a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) > 20


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with ticks that are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values, of fewer at the start."""
    total, means = 0.0, []
    for at, value in enumerate(values):
        total += value - (values[at - window] if at >= window else 0.0)
        means.append(total / min(at + 1, window))
    return means


def thinned(points: Sequence[Any]) -> list[Any]:
    """At most `MAX_POINTS`, evenly taken, the last one included: a page need not hold a million."""
    stride = -(-len(points) // MAX_POINTS)
    return list(points[::-1][::stride][::-1]) if stride > 1 else list(points)


def _for_the_page(svg: str, title: str) -> str:
    svg = _XML_HEAD.sub("", svg)
    svg = _SIZE.sub(lambda match: match[1] or "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return svg.replace(INK, "currentColor")
