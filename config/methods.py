"""Methods: the stages that a run goes through. A stage is a file of its name in trainers/."""

from __future__ import annotations

# One entry a method.
METHODS: dict[str, tuple[str, ...]] = {"glann": ("glo", "sampler")}
