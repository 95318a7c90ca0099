"""Rows of one table of ratios: what a thing costs here, over what it costs by other means, both measured in one run.

Needs Python and torch only, as `gpu.py` is carried to machines that have nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
VERDICTS = ("meets", "falls short", "not measured")
Clock = Callable[[], float]
Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A cost of ours beside the same cost of something else, and how many times as much that must be.

    theirs, ours: in `unit`, the less the better; NaN if it was not measured, and `note` then says why. `theirs` of an
    aim that is no measurement is the aim. bar: least ratio theirs / ours.
    """

    work: str
    against: str
    theirs: float
    ours: float
    unit: str
    bar: float = 1.0
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours if self.ours else math.inf

    @property
    def verdict(self) -> str:
        if math.isnan(self.ratio):
            return "not measured"
        return "meets" if self.ratio >= self.bar else "falls short"


def not_measured(work: str, reason: str, against: str = "-") -> Row:
    return Row(work, against, math.nan, math.nan, "s", note=reason)


def least(sides: Mapping[str, Work], repeats: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """The least cost of each side by `clock`, after one run that does not count.

    They take turns, so that a busy machine is busy for all.
    """
    taken = dict.fromkeys(sides, math.inf)
    for repeat in range(repeats + 1):
        for name, work in sides.items():
            start = clock()
            work()
            if repeat:
                taken[name] = min(taken[name], clock() - start)
    return taken


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of the table, and a last one that counts the verdicts."""
    heads = ("work", "against", "theirs", "ours", "ratio", "bar", "")
    cells = [
        (row.work, row.against, _number(row.theirs, row.unit), _number(row.ours, row.unit), *_ratio(row), row.verdict)
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = []
    for line in (heads, *cells):
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:6], widths[2:6], strict=True)]
        lines.append("  ".join([*left, *right, line[6]]).rstrip())
    lines += [f"  {row.work}: {row.note}" for row in rows if row.note]
    counted = [f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in VERDICTS]
    return [*lines, f"{len(rows)} rows: " + ", ".join(counted)]


def _number(value: float, unit: str) -> str:
    if math.isnan(value):
        return "-"
    scaled, prefix = value, ""
    if unit == "s" and value < 0.1:
        scaled, prefix = 1e3 * value, "m"
    elif unit == "B":
        scaled, prefix = value / 2**20, "Mi"
    return f"{scaled:.3g} {prefix}{unit}" if scaled < 1000 else f"{scaled:,.0f} {prefix}{unit}"


def _ratio(row: Row) -> tuple[str, str]:
    return ("-" if math.isnan(row.ratio) else f"{row.ratio:.2f}"), f"{row.bar:g}"


def machine(device: str = "") -> dict[str, object]:
    """What the figures depend on. device: product name of a GPU; empty is this machine's CPU."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = named[1] if named else cpu
    return {
        "device": device or cpu,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def report(rows: Sequence[Row], on: Mapping[str, object], folder: Path = RESULTS) -> None:
    """Print the table and write it to `<machine>-<date>.json`."""
    print(f"{on['device']}, {on['cores']} cores, load {on['load']:.1f}, torch {on['torch']}, {on['date']}")
    print("\n".join(table(rows)[:-1]))
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(on["device"]).lower()).strip("-")
    path = folder / f"{name}-{on['date']}.json"
    found = [
        {key: None if value != value else value for key, value in asdict(row).items()}
        | {"ratio": None if math.isnan(row.ratio) else row.ratio, "verdict": row.verdict}
        for row in rows
    ]
    path.write_text(json.dumps({"machine": dict(on), "rows": found}, indent=1) + "\n")
    print(f"written to {path}")
    print(table(rows)[-1])
