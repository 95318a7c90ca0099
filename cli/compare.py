"""`glann compare`: methods side by side."""

from __future__ import annotations

from typing import Annotated

import typer


def compare(
    comparison: Annotated[
        str, typer.Argument(metavar="COMPARISON", help="a YAML file, or the name of a bundled comparison")
    ],
    retry: Annotated[bool, typer.Option("--retry", help="also make those runs again that failed")] = False,
) -> None:
    """Train and measure methods alike, or resume an interrupted comparison: the same command does both.

    \b
    glann compare samplers           the samplers on one stage 1 of the digits, three seeds
    glann compare my-methods.yaml
    glann compare my-methods.yaml --retry

    The comparison's folder, studies/NAME, has report.html with the table, samples and curves, and table.md.
    """
    from rich.console import Console

    from ..tuning.compare.comparison import load_comparison
    from ..tuning.compare.driver import run_comparison
    from ..tuning.compare.report import TABLE

    loaded, console = load_comparison(comparison), Console()
    report = run_comparison(loaded, console, retry)
    typer.echo(f"report: {report}\n")
    typer.echo((report.parent / TABLE).read_text(encoding="utf-8"), nl=False)
