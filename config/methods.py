"""Methods: the stages of a run, in order. Each stage is a module of that name in trainers/."""

from __future__ import annotations

# One entry per method.
METHODS: dict[str, tuple[str, ...]] = {"glann": ("glo", "sampler")}
