"""Contents of a run folder, read once for the report and the model card.

A run that is still training, or was interrupted, has no summary and possibly no images: everything here except
the configuration may be empty.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config.run import Config
from ..storage import journal
from ..storage.journal import Entry
from .run_folder import IMAGES, JOURNAL, read_config, read_summary

_NO_STAGES = ("run", "evaluation", "study")  # values of `stage` in a journal that are not training stages
_PREVIEW = re.compile(r"([a-z0-9-]+)-epoch-(\d+)-(reconstructions|samples)\.png")


@dataclass(frozen=True)
class Preview:
    """A preview picture from training."""

    stage: str
    epoch: int
    kind: str
    path: Path


@dataclass(frozen=True)
class StageFacts:
    """Figures of a stage, from the journal.

    steps: of the networks; 0 if unknown. first_loss, last_loss: means over the first and the last twentieth of its
    entries. seconds: from its first to its last entry, without interruptions.
    """

    name: str
    title: str
    epochs: int
    steps: int
    first_loss: float | None
    last_loss: float | None
    seconds: float
    images_per_s: float | None
    stall_s: float
    entries: list[Entry] = field(repr=False)


@dataclass(frozen=True)
class RunFacts:
    """Configuration, stages, previews, summary and warnings of a run."""

    run_dir: Path
    config: Config
    stages: list[StageFacts]
    previews: list[Preview]
    summary: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, run_dir: Path) -> RunFacts:
        """Read a run folder. Raises UserError if it is not a run folder, or a file in it is damaged."""
        config = read_config(run_dir)
        entries = journal.entries(run_dir / JOURNAL)
        stages = [
            _stage(name, title, [e for e in entries if e.get("stage") == name])
            for name, title in stage_titles(entries).items()
        ]
        return cls(
            run_dir,
            config,
            [stage for stage in stages if stage.entries],
            _previews(run_dir / IMAGES),
            read_summary(run_dir) or {},
            list(dict.fromkeys(str(e["text"]) for e in entries if e.get("event") == "warning" and "text" in e)),
        )

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def metrics(self) -> dict[str, float]:
        return self.summary.get("metrics", {})

    @property
    def deviations(self) -> dict[str, float]:
        return self.summary.get("deviations", {})

    @property
    def timings(self) -> dict[str, Any]:
        return self.summary.get("timings", {})

    @property
    def made(self) -> dict[str, str]:
        """When, where and with what the run was made; empty for an unfinished one, or one of glann 0.1.

        The names are time, host, hardware, version, commit and mlflow, the address of its page.
        """
        held = self.summary.get("made")
        made = {str(name): str(value) for name, value in held.items() if value} if isinstance(held, dict) else {}
        if not made.get("mlflow", "").startswith(("http://", "https://")):
            made.pop("mlflow", None)
        return made

    def picture(self, name: str) -> Path | None:
        """Path of images/<name>.png, if it exists."""
        path = self.run_dir / IMAGES / f"{name}.png"
        return path if path.is_file() else None


def series(entries: list[Entry], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the entries with a number under `key`."""
    pairs = [(e["step"], float(e[key])) for e in entries if isinstance(e.get(key), int | float) and "step" in e]
    return [step for step, _ in pairs], [value for _, value in pairs]


def stage_titles(entries: list[Entry]) -> dict[str, str]:
    """Titles of the stages of a run by name, in order, as recorded in the journal.

    Journals of glann 0.1 have no titles: stages are ordered by their steps, and the title is the name in capitals.
    """
    for entry in reversed(entries):
        if entry.get("event") == "stages" and isinstance(entry.get("stages"), list):
            known = [stage for stage in entry["stages"] if isinstance(stage, dict)]
            return {str(stage.get("name")): str(stage.get("title")) for stage in known}
    trained = [e for e in entries if e.get("stage") not in (None, *_NO_STAGES) and e.get("step") is not None]
    names = dict.fromkeys(str(entry["stage"]) for entry in sorted(trained, key=lambda entry: entry["step"]))
    return {name: name.upper() for name in names}


def _steps(entries: list[Entry]) -> int:
    """Steps of all epochs; 0 if their number was not recorded, as by glann 0.1. A repeated epoch counts once."""
    by_epoch = {int(e["epoch"]): int(e["steps"]) for e in entries if e.get("epoch") and e.get("steps")}
    return sum(by_epoch.values())


def _stage(name: str, title: str, entries: list[Entry]) -> StageFacts:
    _, losses = series(entries, "loss")
    _, speeds = series(entries, "images_per_s")
    _, stalls = series(entries, "checkpoint_stall_s")
    share = max(1, len(losses) // 20)
    times = sorted(series(entries, "time")[1])
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # an interruption is a gap far beyond the usual one between two entries
    usual = 20 * statistics.median(gaps) + 60 if gaps else 0.0
    return StageFacts(
        name=name,
        title=title,
        epochs=max((int(e.get("epoch") or 0) for e in entries), default=0),
        steps=_steps(entries),
        first_loss=statistics.fmean(losses[:share]) if losses else None,
        last_loss=statistics.fmean(losses[-share:]) if losses else None,
        seconds=sum(gap for gap in gaps if gap <= usual),
        images_per_s=statistics.median(speeds) if speeds else None,
        stall_s=sum(stalls),
        entries=entries,
    )


def _previews(folder: Path) -> list[Preview]:
    named = ((path, _PREVIEW.fullmatch(path.name)) for path in folder.glob("*.png"))
    found = [Preview(match[1], int(match[2]), match[3], path) for path, match in named if match]
    return sorted(found, key=lambda preview: (preview.stage, preview.kind, preview.epoch))
