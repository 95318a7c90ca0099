"""`glann tune`: a study from the command line."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..tuning.study import StudyConfig


def tune(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="a YAML file, or the name of a study that ships along")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="how many in all, the base recipe's among them; empty: as the study says")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on only: refuse where there is nothing to go on")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the trials it would begin with and their cost, start nothing")
    ] = False,
) -> None:
    """Search for better values of a recipe, or go on where an interrupted study stopped: it is the same command.

    \b
    glann tune digits                        12 trials over both stages, two workers, no GPU
    glann tune my-study.yaml --trials 50
    glann tune my-study.yaml --dry-run       what it would try, and what that costs

    The study's folder, studies/NAME, has report.html with the leaderboard and the best trial's command.
    """
    from rich.console import Console

    from ..tuning.study import load_study

    loaded, console = load_study(study, trials), Console()
    if dry_run:
        from ..tuning.forecast import forecast

        console.print(forecast(loaded))
        return
    from ..tuning.driver import run_study

    report = run_study(loaded, console, resume)
    print_best(loaded, console)
    console.print(f"look at {report}", soft_wrap=True)


def print_best(study: StudyConfig, console: Console) -> None:
    """Print the best trial beside the base recipe, and the commands to train and register it."""
    from ..tuning.ledger import BASELINE, best_of, format_params, trials
    from ..tuning.report.leaderboard import command

    found = trials(study.folder)
    counts = Counter(trial.state for trial in found.values())
    console.print(f"{study.name}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    best, base = best_of(found.values(), study.minimize), found.get(BASELINE)
    if best is None:
        console.print("no trial has finished; why is in the report")
        return
    values = format_params(best.params)
    console.print(f"best: trial {best.number}, {study.metric} {best.value:.4g}, {values}", soft_wrap=True)
    if base is not None and base.value is not None and best.number != BASELINE:
        console.print(f"base recipe: {study.metric} {base.value:.4g}")
    console.print(f"train it again: {command(study, best)}", soft_wrap=True, highlight=False)
    console.print(f"register it: glann registry register {study.run_dir(best.number)} --as NAME", soft_wrap=True)
