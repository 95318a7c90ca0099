"""The progress bar of a run, drawn from its status: where it trains, and by `glann jobs watch` from anywhere."""

from __future__ import annotations

from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from .status import Status, health, progress

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 20  # characters; the numbers need the rest


class StatusBar:
    """A bar of the stage, and the status in words. Use as a context manager; draws nothing where it cannot."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(BAR_WIDTH),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),
            console=console,
            transient=True,
            expand=True,
            disable=not draws_bars(console),
        )
        self.task = self.bar.add_task("", total=None, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def show(self, status: Status, note: str = "") -> None:
        """Draw a status. note: replaces its words."""
        words = note or "  ".join(word for word in (progress(status), status.message, health(status)) if word)
        known = None if status.done is None else 1.0
        self.bar.update(self.task, description=status.stage, total=known, completed=status.done or 0.0, note=words)

    def note(self, words: str) -> None:
        """Draw words where no status is known."""
        self.bar.update(self.task, description="", total=None, note=words)


def draws_bars(console: Console) -> bool:
    """Whether it can draw over what it has drawn: a terminal, or a notebook with what rich needs for that."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
