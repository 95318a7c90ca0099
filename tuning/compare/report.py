"""report.html and table.md of a comparison."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from ... import __version__
from ...config.run import redacted_config
from ...errors import redact
from ...reports.charts import INK, drawing
from ...reports.page import Figure, environment, figure, write_page
from ...reports.run_folder import REPORT
from ..ledger import trials
from .comparison import Cell, Comparison
from .measure import REAL, STRIPS, read_curve
from .table import (
    Table,
    as_markdown,
    build_table,
    by_distance,
    last_line,
    last_of_each,
    published_as_markdown,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

TABLE = "table.md"
COLOURS = ("#3f7fd9", "#d9822b", "#3f9d5d", "#b8519b", "#8a6fd1", "#c2453e", "#2f9aa0", "#8c7a3d", "#6b7785", "#d26f9c")
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))


def write_report(comparison: Comparison) -> Path:
    """Write the report and the table of a comparison, whether or not all runs are done.

    Raises:
        UserError: the ledger or a picture is damaged. EnvironmentFault: the disk is full or failing.
    """
    table = build_table(comparison, trials(comparison.folder).values())
    parts = [as_markdown(table), published_as_markdown(comparison), last_line(comparison, table)]
    text = redact("\n".join(filter(None, parts)))
    write_page(comparison.folder / TABLE, text.rstrip() + "\n")
    return write_page(comparison.folder / REPORT, render(comparison, table))


def render(comparison: Comparison, table: Table) -> str:
    """The page as HTML."""
    return (
        environment(Path(__file__).parent)
        .get_template("comparison.html")
        .render(
            comparison=comparison,
            version=__version__,
            headline=headline(comparison),
            progress=progress(comparison),
            ratio=last_line(comparison, table),
            table=table,
            published=[(group.source, by_distance(group)) for group in comparison.published],
            strips=strips(comparison, table),
            curves=curves(comparison, table),
            remarks=[(row.name, redact(remark)) for row in table.rows for remark in row.remarks],
            comparison_yaml=redact(comparison.to_yaml()),
            recipe_yaml=redacted_config(comparison.base()).to_yaml(),
        )
    )


def headline(comparison: Comparison) -> str:
    """One or two sentences on what is compared and how."""
    count, seeds = len(comparison.methods), len(comparison.seeds)
    limit = comparison.budget_minutes
    budget = f", each with at most {limit:g} minutes of training" if limit else ""
    shared = count - len(set(comparison.stage_ones.values()))
    parts = [
        f"{count} method{'s' * (count > 1)} on the data of recipe {Path(comparison.recipe).stem}, {seeds} "
        f"seed{'s' * (seeds > 1)}{budget}."
    ]
    if shared:
        parts.append(f"{shared} of them start{'s' * (shared == 1)} from the stage 1 that another one has trained.")
    return " ".join(parts)


def progress(comparison: Comparison) -> str:
    """One sentence on the runs and their states."""
    last = last_of_each(trials(comparison.folder).values())
    cells = list(comparison.cells())
    states = Counter(last[cell].state if cell in last else "waiting" for cell in cells)
    return f"{len(cells)} runs: " + ", ".join(f"{count} {state}" for state, count in states.items()) + "."


def first_run(comparison: Comparison, method: str) -> str | None:
    """The name of the first finished run of a method."""
    last = last_of_each(trials(comparison.folder).values())
    for seed in comparison.seeds:
        trial = last.get(Cell(method, seed))
        if trial is not None and trial.state == "finished":
            return comparison.run(Cell(method, seed)).name
    return None


def strips(comparison: Comparison, table: Table) -> list[tuple[str, bool, Figure]]:
    """Strips (name, whether they are copies, picture) of training images, and of the methods as they are ranked."""
    found = []
    for name, run, copies in [
        ("training images", REAL, False),
        *((row.name, first_run(comparison, row.name), row.copies) for row in table.methods),
    ]:
        path = comparison.folder / STRIPS / f"{run}.png"
        if run is not None and path.is_file():
            found.append((name, copies, figure(path, name)))
    return found


def curves(comparison: Comparison, table: Table) -> Markup | None:
    """Chart of precision over recall of all methods; None without the group `prd`."""
    named = [(row.name, first_run(comparison, row.name)) for row in table.methods]
    found = [(name, curve) for name, run in named if run and (curve := read_curve(comparison.folder, run))]
    if not found:
        return None

    def draw(figure: Drawing) -> None:
        axes: Axes = figure.add_subplot()
        for at, (name, (precision, recall)) in enumerate(found):
            colour, dash = COLOURS[at % len(COLOURS)], DASHES[at // len(COLOURS) % len(DASHES)]
            axes.plot(recall, precision, linewidth=2, label=name, color=colour, linestyle=dash)
        axes.set_xlabel("recall: how much of the data is there")
        axes.set_ylabel("precision: how much of the samples is of the data")
        axes.set_xlim(0, 1.01)
        axes.set_ylim(0, 1.01)
        axes.set_aspect("equal")
        axes.grid(color=INK, alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)

    return drawing("Precision and recall", (8.0, 5.6), draw)
