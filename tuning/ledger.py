"""trials.jsonl: the state of every trial of a study, one JSON object per line, append-only.

A study resumes from its ledger alone: the next trial is a function of it (`search.suggest`), and a trial that was
started and has not ended is resumed in its run folder. A line is on disk, and beside the checkpoints where these are in
shared storage, before anything depends on it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal

from ..config.shorthands import canonical
from ..errors import EnvironmentFault, GlannError, UserError, one_line
from ..metrics.result import canonical_keys
from ..storage.journal import Journal, read

log = logging.getLogger(__name__)

FILE = "trials.jsonl"
BASELINE = 0  # number of the trial that is the base recipe itself
State = Literal["running", "finished", "stopped", "failed"]
STATES: tuple[State, ...] = ("running", "finished", "stopped", "failed")


@dataclass(frozen=True)
class Trial:
    """One trial.

    params: values by dotted key of the recipe; empty for the base recipe. For a member of a population, its last
        values.
    state: `running` (also if interrupted), `finished`, `stopped` early by the scheduler, or `failed`.
    value: the study's metric, if finished. metrics: everything that was measured, by name.
    epoch, loss: last epoch of stage 1, and its loss. why: reason of a failure, in one line.
    """

    number: int
    params: dict[str, Any]
    state: State = "running"
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    loss: float | None = None
    why: str = ""
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state != "running"


_Number = int | float
# Fields of the line of an ended trial, with their types; a number that was not finite is null.
_FACTS: dict[str, type | UnionType] = {
    "params": dict,
    "state": str,
    "value": _Number | None,
    "metrics": dict,
    "epoch": int,
    "loss": _Number | None,
    "why": str,
    "seconds": _Number,
}


class Ledger:
    """The trials of a study folder, open for appending."""

    def __init__(self, folder: Path, share: Callable[[Path], None] = lambda path: None) -> None:
        """`share`: copies the file to where it outlives this machine, after every line."""
        self.path, self._share = folder / FILE, share
        self._trials = trials(folder)
        self._journal = Journal(self.path)

    @property
    def trials(self) -> list[Trial]:
        """Every trial, by number."""
        return [self._trials[number] for number in sorted(self._trials)]

    def start(self, params: dict[str, Any]) -> Trial:
        """Append a new trial."""
        trial = Trial(max(self._trials, default=BASELINE - 1) + 1, params)
        self._write(trial, {"event": "started", "trial": trial.number, "params": params})
        self._share(self.path)  # otherwise another head would start a trial of that number with other values
        return trial

    def end(
        self, trial: Trial, seconds: float = 0.0, metrics: Mapping[str, float] = MappingProxyType({}), **facts: Any
    ) -> Trial:
        """Append the end of a trial: `state`, and any other fields of `Trial`.

        `seconds`: of this start; added to those of earlier starts. `metrics`: values that are not finite are left
        out, as JSON cannot represent them.
        """
        measured = {name: value for name, value in metrics.items() if math.isfinite(value)}
        ended = replace(trial, seconds=trial.seconds + seconds, metrics=measured, **facts)
        fields = {key: value for key, value in asdict(ended).items() if key != "number"}
        self._write(ended, {"event": "ended", "trial": trial.number} | fields)
        return ended

    def interrupt(self, trial: Trial, seconds: float) -> Trial:
        """Append that a trial was interrupted after `seconds` and will be resumed."""
        paused = replace(trial, seconds=trial.seconds + seconds)
        self._write(
            paused, {"event": "interrupted", "trial": trial.number, "state": "running", "seconds": paused.seconds}
        )
        return paused

    def _write(self, trial: Trial, line: dict[str, Any]) -> None:
        self._journal.append(line)
        self._journal.sync()
        self._trials[trial.number] = trial
        if line["event"] == "started":
            return
        try:
            self._share(self.path)
        except EnvironmentFault as error:  # the next line brings it, or the trial is looked at again
            log.warning("what became of trial %d was not copied to shared storage yet: %s", trial.number, error)

    def close(self) -> None:
        self._journal.close()


def trials(folder: Path) -> dict[int, Trial]:
    """The trials in a study folder, by number; empty if there is no ledger.

    Raises:
        UserError: the ledger is damaged.
    """
    found: dict[int, Trial] = {}
    for number, line in _lines(folder / FILE):
        if "params" in line:  # an older ledger has the short names of some keys
            line["params"] = {canonical(key): value for key, value in line["params"].items()}
        if line["event"] == "started":
            found[number] = Trial(number, line["params"])
        else:
            facts = {key: value for key, value in line.items() if key in _FACTS}
            if "metrics" in facts:
                facts["metrics"] = canonical_keys(facts["metrics"])
            found[number] = replace(found[number], **facts)
    return found


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line with the number of its trial. Raises UserError at the first invalid line."""
    begun: set[int] = set()
    for end, line in read(path):
        number: Any = line.get("trial")
        event = line.get("event")
        good = isinstance(number, int) and not isinstance(number, bool) and number >= 0
        if event == "started":
            good = good and isinstance(line.get("params"), dict) and number not in begun
        else:
            known = line.get("state") in STATES and number in begun
            good = good and event in ("ended", "interrupted") and known and _are_facts(line)
        if not good:
            raise UserError(f"{path} is damaged before byte {end}: not a valid line of a study; remove that line")
        begun.add(number)
        yield number, line


def _are_facts(line: dict[str, Any]) -> bool:
    typed = all(isinstance(line[key], kind) for key, kind in _FACTS.items() if key in line)
    return typed and all(isinstance(value, _Number) for value in line.get("metrics", {}).values())


def best_of(trials: Iterable[Trial], minimize: bool) -> Trial | None:
    """The finished trial with the best value, the first if several are equal; None if none has finished."""
    sign = 1.0 if minimize else -1.0
    valued = [(sign * trial.value, trial.number, trial) for trial in trials if trial.value is not None]
    return min(valued, default=(0.0, 0, None))[2]


def reason(error: Exception) -> str:
    """Why a trial failed, in one line."""
    text = one_line(error, 500)
    return text if isinstance(error, GlannError) else f"{type(error).__name__}: {text}"


def format_params(params: dict[str, Any]) -> str:
    """Format values as `glo.latent_lr=0.013 sampler.noise_dim=16`, numbers with four digits."""
    if not params:
        return "the base recipe"
    short = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in params.items()}
    return " ".join(f"{key}={value}" for key, value in short.items())
