"""Something that is done every so often beside the rest, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

END_S = 15.0


@contextmanager
def repeated(action: Callable[[], None], every_s: float, name: str, at_end: bool = False) -> Iterator[None]:
    """Call `action`, which must not raise, every so often while inside, and `at_end` once more at the end.

    The end waits for a call in progress, but not for long: it may hang at a store that does not answer.
    """
    over = threading.Event()

    def beat() -> None:
        while not over.wait(every_s):
            action()
        if at_end:
            action()

    thread = threading.Thread(target=beat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(END_S)
