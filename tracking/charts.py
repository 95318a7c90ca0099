"""Line charts as inline SVG that take their ink from the page, so they are right in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

_INK = "#010203"  # drawn by matplotlib, then replaced by the page's text colour
LINE = "#3f7fd9"  # legible on white and on near-black
MAX_POINTS = 1500
_XML_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*"')


def line_chart(steps: Sequence[int], values: Sequence[float], *, title: str, label: str, log: bool = False) -> str:
    """An SVG element: the values over the steps, faint, and their running mean over 2% of the steps, bold."""
    import matplotlib
    from matplotlib.figure import Figure  # the object interface: no window system, no global state

    settings: Any = {  # matplotlib types each of its 300 keys
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        steps, values = _thinned(steps), _thinned(values)
        axes.plot(steps, values, color=LINE, alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(values, max(1, len(values) // 50)), color=LINE, linewidth=2)
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if log and min(values) > 0 and max(values) / min(values) > 20:
            axes.set_yscale("log")
        axes.grid(axis="y", color=_INK, alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_the_page(buffer.getvalue(), title)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values, of fewer at the start."""
    total, means = 0.0, []
    for at, value in enumerate(values):
        total += value - (values[at - window] if at >= window else 0.0)
        means.append(total / min(at + 1, window))
    return means


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most `MAX_POINTS`, evenly taken, the last one included: a page need not hold a million."""
    stride = -(-len(points) // MAX_POINTS)
    return list(points[::-1][::stride][::-1]) if stride > 1 else list(points)


def _for_the_page(svg: str, title: str) -> str:
    svg = _XML_HEAD.sub("", svg)
    svg = _SIZE.sub(lambda match: match[1] or "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return svg.replace(_INK, "currentColor")
