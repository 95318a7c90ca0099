"""What a larger whole, such as a study, does with one of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .events import Event


@dataclass(frozen=True)
class Hooks:
    """Where a run belongs, who is notified of its events, and what may end it.

    parent_run_id, tags: of the run in MLflow. notify: called with every event, after the run's own log.
    stop: polled all the time; as soon as it returns a reason the run is saved and stopped (`recovery.RunStopped`).
    """

    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    notify: Callable[[Event], None] = lambda event: None
    stop: Callable[[], str] = lambda: ""


NO_HOOKS = Hooks()
