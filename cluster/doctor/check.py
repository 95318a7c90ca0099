"""Result of one check of `glann doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What a check found and, if it failed, the remedy."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
