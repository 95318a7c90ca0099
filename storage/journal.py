"""metrics.jsonl: the append-only log of a run, one JSON object per line.

A resumed run repeats some steps: readers take the last entry of each (stage, step).  A line that a
crash left incomplete is dropped when the journal is opened again.  Non-finite numbers are written
as null, since JSON cannot represent them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import os_fault

Entry = dict[str, Any]
FILE = "metrics.jsonl"
SYNC_EVERY_S = 5.0
_KINDS: dict[str, type | tuple[type, ...]] = {"stage": str, "step": int, "epoch": (int, float), "time": (int, float)}


class Journal:
    """The journal of one run folder, open for appending.

    Lines are flushed to the operating system at once, so they survive a crash of the process; they are
    synced to disk every few seconds and on `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115 - lives as long as the run
            _drop_torn_line(path)
        except OSError as error:
            raise os_fault(error, path) from error

    def append(self, entry: Entry) -> None:
        """Append an entry; `time` (seconds since 1970) is added if missing.

        Raises:
            UserError: a value that JSON cannot represent.
            EnvironmentFault: the disk is full or failing.
        """
        try:
            line = json.dumps(_finite({"time": time.time()} | entry), allow_nan=False, separators=(",", ":"))
        except TypeError as error:
            raise UserError(f"an entry of {self.path} is not valid JSON data: {error}") from error
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_EVERY_S:
                self.sync()
        except OSError as error:
            raise os_fault(error, self.path) from error

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()


def read(path: Path, offset: int = 0) -> Iterator[tuple[int, Entry]]:
    """Entries from byte `offset` on, each with the offset of its end; stops at an incomplete line.

    Raises:
        UserError: a complete line is not a JSON object.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            if line.strip():
                yield offset, _parse(path, line, offset)


def entries(path: Path) -> list[Entry]:
    """The last entry of each (stage, step), ordered by stage and step; then the entries without a step."""
    latest: dict[tuple[Any, Any], Entry] = {}
    loose: list[Entry] = []
    for _, entry in read(path):
        if entry.get("step") is None:
            loose.append(entry)
            continue
        key = (entry.get("stage"), entry["step"])
        latest.pop(key, None)  # moves the key to the end: insertion order is order of the last write
        latest[key] = entry
    return sorted(latest.values(), key=lambda entry: (str(entry.get("stage")), entry["step"])) + loose


def _parse(path: Path, line: bytes, end: int) -> Entry:
    try:
        entry = strict_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged before byte {end}: a line is not JSON; remove that line") from error
    if not isinstance(entry, dict):
        raise UserError(f"{path} is damaged before byte {end}: a line is not a JSON object; remove that line")
    for key, kind in _KINDS.items():
        value = entry.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{path} is damaged before byte {end}: {key} is of a wrong type; remove that line")
    return entry


def strict_json(text: str | bytes) -> Any:
    """Parse JSON; reject NaN, infinity, and numbers out of the range of floats and database integers.

    Raises:
        ValueError, RecursionError: invalid JSON, or such a number.
    """
    return json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_number)


def _number(word: str) -> int | float:
    number = float(word)
    if not abs(number) < 2.0**63 and (not math.isfinite(number) or word.lstrip("-").isdigit()):
        raise ValueError(f"{word[:40]} is out of range")
    return int(word) if word.lstrip("-").isdigit() else number


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _drop_torn_line(path: Path) -> None:
    """Truncate the file after its last newline: the rest is an incomplete entry of a crashed process."""
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - 65536, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
