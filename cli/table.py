"""Listings of commands: a table on a terminal, tab-separated lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import typer


def print_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], empty: str) -> None:
    """Print rows below a header; on a terminal, print `empty` if there are none."""
    rows = list(rows)
    if not sys.stdout.isatty():
        for row in (head, *rows):
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Column, Table

    # an address that is cut off cannot be copied
    table = Table(*(Column(title, overflow="fold") for title in head), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table if rows else empty)
