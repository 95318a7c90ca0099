"""`glann tune`: run a study."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Overrides

if TYPE_CHECKING:
    from rich.console import Console

    from ..tuning.study import StudyConfig


def tune(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="a YAML file, or the name of a bundled study")],
    overrides: Overrides = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="number of trials in all, the base recipe's included; empty: as in the study"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="only resume: fail if there is no study to resume")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the first trials and their cost, start nothing")
    ] = False,
) -> None:
    """Search for better values of a recipe, or resume an interrupted study: the same command does both.

    \b
    glann tune digits                        12 trials over both stages, two workers, no GPU
    glann tune my-study.yaml --trials 50
    glann tune my-study.yaml --dry-run       the first trials and their cost

    The study's folder, studies/NAME, has report.html with the leaderboard and the best trial's command.
    """
    from rich.console import Console

    from ..tuning.load import load_study

    loaded, console = load_study(study, trials, overrides or []), Console()
    if dry_run:
        from ..tuning.forecast import forecast

        console.print(forecast(loaded))
        return
    from ..tuning.driver import run_study

    report = run_study(loaded, console, resume)
    print_best(loaded, console)
    for line in last_lines(loaded, report):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_best(study: StudyConfig, console: Console) -> None:
    """Print the best trial beside the base recipe, and the commands to train and register it."""
    from ..tuning.ledger import BASELINE, best_of, format_params, trials
    from ..tuning.report.leaderboard import command

    found = trials(study.folder)
    counts = Counter(trial.state for trial in found.values())
    console.print(f"{study.name}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    best, base = best_of(found.values(), study.minimize), found.get(BASELINE)
    if best is None:
        console.print("no trial has finished; the report has the reasons")
        return
    values = format_params(best.params)
    console.print(f"best: trial {best.number}, {study.metric} {best.value:.4g}, {values}", soft_wrap=True)
    if base is not None and base.value is not None and best.number != BASELINE:
        console.print(f"base recipe: {study.metric} {base.value:.4g}")
    console.print(f"train it again: {command(study, best)}", soft_wrap=True, highlight=False, markup=False)


def last_lines(study: StudyConfig, report: Path) -> list[str]:
    """Where the results are, and how to register the best: here, or for the user of a job, whose machine is another."""
    import shlex

    from ..trainers.run.shared import is_job
    from ..tuning.ledger import best_of, trials

    if is_job():
        from ..tracking.outbox import OutboxState
        from ..tuning.shared import end_of

        state = OutboxState.load(study.folder)
        return end_of(study.base(), (state and state.link) or "").lines()
    best = best_of(trials(study.folder).values(), study.minimize)
    words = ["glann", "registry", "register", str(study.run_dir(best.number)), "--as", "NAME"] if best else []
    return [*([f"register it: {shlex.join(words)}"] if best else []), f"report: {report}"]
