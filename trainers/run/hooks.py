"""Hooks through which a caller such as a study supervises a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .events import Event


@dataclass(frozen=True)
class Hooks:
    """MLflow parent and tags of a run, and callbacks.

    notify: called with every event, after the run's own log. stop: polled continuously; once it returns a reason, the
    run is saved and stopped (`recovery.RunStopped`).
    """

    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    notify: Callable[[Event], None] = lambda event: None
    stop: Callable[[], str] = lambda: ""


NO_HOOKS = Hooks()
