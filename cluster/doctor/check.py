"""What `glann doctor` says: one answer per question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """The answer to one question: what was found and, where it is bad, what to do."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
