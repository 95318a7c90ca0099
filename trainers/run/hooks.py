"""A run that is part of something larger, such as a study: who hears of it, where it belongs, and what may end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]


@dataclass(frozen=True)
class Supervision:
    """What a larger whole does with one of its runs.

    parent_run_id, tags: of the run in MLflow. hear: told every event of the workers, after the run's own log.
    stop: asked all the time; as soon as it gives a reason the run is saved and stopped (`recovery.RunStopped`).
    """

    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    hear: Callable[[Event], None] = lambda event: None
    stop: Callable[[], str] = lambda: ""


ALONE = Supervision()
