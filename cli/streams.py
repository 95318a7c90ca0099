"""The standard streams, whatever the shell made of them: closed, full, or of an encoding that lacks a character."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def open_streams() -> None:
    """Open closed standard streams on /dev/null, and write characters that an encoding lacks as `\\u2026`.

    A closed descriptor would become that of the next file to be opened, and what is printed would go there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
        elif name == "stdout" and isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def print_error(text: str) -> None:
    """Print to stderr; where that cannot be written, the exit status has to do."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def discard_unwritten() -> None:
    """Discard what a stream could not be given: Python would try again at its end, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
