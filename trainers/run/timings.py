"""How long a run has taken: this start of it, and the earlier ones, as far as its journal records them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...storage import journal

BEGINS = "stages"  # the event by which every start of a run begins


@dataclass
class Timings:
    """Seconds of a run, over its starts. A start lasts from its first entry in the journal to its last one.

    Args:
        starts: how many there were. run_s: in total, waiting for workers and measuring included. stages: in finished
            epochs, by stage; an epoch that was repeated counts as often as it was trained. stall_s: for which training
            paused for checkpoints. measuring_s: and for measurements. images_per_s: the last rate of an epoch.
    """

    starts: int = 0
    run_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    stall_s: float = 0.0
    measuring_s: float = 0.0
    images_per_s: float = 0.0

    @classmethod
    def of_journal(cls, path: Path) -> Timings:
        """Those of all starts that a journal records; none if there is no journal yet."""
        return cls.of_entries(entry for _, entry in journal.read(path))

    @classmethod
    def of_entries(cls, entries: Iterable[dict[str, Any]]) -> Timings:
        """Those of entries in the order in which they were written."""
        found, began, last = cls(), None, None
        for entry in entries:
            if entry.get("event") == BEGINS:
                found.starts += 1
                found.run_s += _between(began, last)
                began = entry.get("time")
            last = entry.get("time", last)
            found.stall_s += _number(entry, "checkpoint_stall_s")
            found.measuring_s += _number(entry, "measuring_s")
            if "epoch" in entry and (seconds := _number(entry, "seconds")):
                stage = str(entry.get("stage"))
                found.stages[stage] = found.stages.get(stage, 0.0) + seconds
                found.images_per_s = _number(entry, "images_per_s") or found.images_per_s
        found.run_s += _between(began, last)
        return found


def _between(began: float | None, last: float | None) -> float:
    return max(0.0, last - began) if began is not None and last is not None else 0.0


def _number(entry: dict[str, Any], key: str) -> float:
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
