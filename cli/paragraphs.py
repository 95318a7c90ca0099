"""Help texts whose paragraphs fill the terminal."""

from __future__ import annotations

import inspect

import typer

AS_WRITTEN = "\b"  # first character of a paragraph whose lines are kept, such as examples


def fill_paragraphs(app: typer.Typer) -> None:
    """Join the lines of the paragraphs of every command's help; typer does so in the first paragraph only, and would
    break the others where the source does and where the terminal ends."""
    for command in app.registered_commands:
        if command.callback is not None:
            paragraphs = inspect.cleandoc(command.help or command.callback.__doc__ or "").split("\n\n")
            command.help = "\n\n".join(text if text.startswith(AS_WRITTEN) else _joined(text) for text in paragraphs)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            fill_paragraphs(group.typer_instance)


def _joined(paragraph: str) -> str:
    return " ".join(paragraph.split())
