"""Progress of a long command on stderr: a bar on a terminal, else a line a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

LINE_EVERY_S = 60.0


@contextmanager
def counted(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, in all) that shows progress while inside: `evaluating  300 of 2,906 images`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, shown = Console(stderr=True), monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, note="")

        def show(done: int, total: int) -> None:
            nonlocal shown
            note = f"{done:,} of {total:,} {unit}"
            bar.update(task, completed=done, total=total, note=note)
            if not console.is_terminal and monotonic() - shown >= LINE_EVERY_S:
                shown = monotonic()
                console.print(f"{what}  {note}")

        yield show
