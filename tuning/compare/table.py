"""The table of a comparison: a row for every method, with means and deviations over its seeds.

Above the methods stand what bounds them: real images against real ones, and the reconstructions of every stage 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...metrics.result import FLOOR, HELD_OUT, OWN, RECONSTRUCTION, to_key
from ...metrics.spec import CODES, METRICS, frechet_name, measured_with
from ...reports.copying import copies
from ..ledger import Trial
from .comparison import Cell, Comparison, Published
from .measure import DRAWS, FIT_S, TRAIN_S

COPIED = "COPIES"  # begins the remark on a method whose samples are copies
BOUNDS = {FLOOR: "real images", RECONSTRUCTION: "reconstructions"}


@dataclass(frozen=True)
class Column:
    """A column. key: of the values. better: "lower", "higher" or empty."""

    key: str
    title: str
    format: str
    better: str = ""


@dataclass(frozen=True)
class Spread:
    """Mean over the seeds and standard deviation, which one seed does not have."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, column: Column) -> str:
        mean = column.format.format(self.mean)
        return mean if self.deviation is None else f"{mean} ± {column.format.format(self.deviation)}"


@dataclass(frozen=True)
class Row:
    """A row.

    name: of a method, or what bounds methods. spreads: by key of a column. remarks: what has to be said in words: that
    its samples are copies, that a run failed or is not done.
    """

    name: str
    is_method: bool
    spreads: Mapping[str, Spread]
    remarks: tuple[str, ...] = ()

    @property
    def copies(self) -> bool:
        return any(remark.startswith(COPIED) for remark in self.remarks)

    def cell(self, column: Column) -> str:
        spread = self.spreads.get(column.key)
        return "–" if spread is None else spread.text(column)


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    rows: list[Row]

    @property
    def methods(self) -> list[Row]:
        return [row for row in self.rows if row.is_method]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def last_of_each(found: Collection[Trial]) -> dict[Cell, Trial]:
    """The last trial of each run."""
    by_number = sorted(found, key=lambda trial: trial.number)
    return {Cell(str(trial.params.get("method")), int(trial.params.get("seed", 0))): trial for trial in by_number}


def build_table(comparison: Comparison, found: Collection[Trial]) -> Table:
    """The table of the runs so far: bounds first, then methods by their distance, and below them those that copy."""
    last = last_of_each(found)
    finished = {cell: trial.metrics for cell, trial in last.items() if trial.state == "finished"}
    keys = set[str]().union(*finished.values())
    against = HELD_OUT if any(key.endswith(f":{HELD_OUT}") for key in keys) else None
    columns = [column for column in all_columns(comparison, against) if column.key in keys]
    methods = [_row(comparison, method, columns, last) for method in comparison.methods]
    ranked = columns[0].key if columns else ""
    methods.sort(key=lambda row: _place(row, ranked))
    return Table(columns, [*_bounds(comparison, columns, finished), *methods])


def all_columns(comparison: Comparison, against: str | None) -> list[Column]:
    """Every column that a comparison may have; the first is the one by which methods are ranked.

    The distance is shown against training and held-out images, other metrics against held-out ones where there are any.
    """
    evaluation = comparison.evaluation
    distance = frechet_name(evaluation.extractor)
    named = {None: "training", HELD_OUT: "held-out"}
    columns = [
        Column(to_key(distance, OWN, reference), f"{METRICS[distance].title}, {named[reference]}", "{:.4g}", "lower")
        for reference in dict.fromkeys((against, None))
    ]
    for metric in measured_with(evaluation.extractor, {*evaluation.metrics, CODES}):  # a sampler that may copy has them
        if metric.of_samples and metric.name != distance:
            in_codes = metric.name.endswith("_codes")
            title = metric.title.replace(f" ({evaluation.extractor})", "")
            columns.append(
                Column(to_key(metric.name, OWN, None if in_codes else against), title, metric.format, metric.better)
            )
    return [
        *columns,
        Column(FIT_S, "Fit of the sampler, s", "{:.0f}", "lower"),
        Column(TRAIN_S, "Training in all, s", "{:.0f}", "lower"),
        Column(DRAWS, "Draws/s", "{:.0f}", "higher"),
    ]


def _place(row: Row, ranked: str) -> tuple[bool, bool, float]:
    """Sorts methods: finished before others, then those that do not copy before those that do, then by distance."""
    distance = row.spreads[ranked].mean if ranked in row.spreads else float("inf")
    return ranked not in row.spreads, row.copies, distance


def _row(comparison: Comparison, method: str, columns: list[Column], last: Mapping[Cell, Trial]) -> Row:
    trials = {seed: last.get(Cell(method, seed)) for seed in comparison.seeds}
    done = [trial.metrics for trial in trials.values() if trial and trial.state == "finished"]
    remarks = [
        f"seed {seed} failed: {trial.why}" for seed, trial in trials.items() if trial and trial.state == "failed"
    ]
    if missing := [str(seed) for seed, trial in trials.items() if trial is None or not trial.ended]:
        remarks.append(f"not done yet: seed {', '.join(missing)}")
    spreads = _spreads(columns, done)
    return Row(method, True, spreads, (*copying(comparison, spreads), *remarks))


def _spreads(
    columns: list[Column], done: list[dict[str, float]], keys: Mapping[str, str] | None = None
) -> dict[str, Spread]:
    spreads = {}
    for column in columns:
        key = column.key if keys is None else keys.get(column.key, "")
        if values := [metrics[key] for metrics in done if key in metrics]:
            spreads[column.key] = Spread.of(values)
    return spreads


def copying(comparison: Comparison, spreads: Mapping[str, Spread]) -> list[str]:
    """In words, if samples are copies of training images, or codes of training codes."""
    extractor = comparison.evaluation.extractor
    keys = to_key(f"copying_{extractor}", OWN, HELD_OUT), to_key("copying_codes", OWN)
    share, codes = (spreads[key].mean if key in spreads else None for key in keys)
    return [f"{COPIED}: {words}" for words in copies(share, codes)]


def _bounds(comparison: Comparison, columns: list[Column], finished: Mapping[Cell, dict[str, float]]) -> list[Row]:
    """Rows of the real images, and of the reconstructions of every stage 1."""
    owners = list(dict.fromkeys(comparison.stage_ones.values()))
    rows = []
    for kind, name in BOUNDS.items():
        keys = {column.key: _of(kind, column.key) for column in columns}
        of_owner = {
            owner: _spreads(columns, [metrics for cell, metrics in finished.items() if cell.method == owner], keys)
            for owner in owners
        }
        found = {owner: spreads for owner, spreads in of_owner.items() if spreads}
        if kind == FLOOR:
            rows += [Row(f"{name} (floor)", False, spreads) for spreads in list(found.values())[:1]]
        else:
            rows += [Row(f"{name} of {owner}", False, spreads) for owner, spreads in found.items()]
    return rows


def _of(sampler: str, key: str) -> str:
    """The key of the same metric of another sampler."""
    metric, _, reference = key.partition(":")
    return to_key(metric, sampler, reference or None) if metric in METRICS else ""


def published_as_markdown(comparison: Comparison) -> str:
    """What others have published, best first within a source; empty without any."""
    if not comparison.published:
        return ""
    lines = ["Published by others, not measured here:", "", "| method | distance | source |", "|---|---|---|"]
    for group in comparison.published:
        lines += [f"| {name} | {figure:g} | {group.source} |" for name, figure in by_distance(group)]
    return "\n".join(lines) + "\n"


def by_distance(group: Published) -> list[tuple[str, float]]:
    return sorted(group.figures.items(), key=lambda item: item[1])


def as_markdown(table: Table) -> str:
    """The table in Markdown, with the remarks below it."""
    lines = ["No run has finished."]
    if table.columns:
        lines = _lines(table)
    remarks = [f"- {row.name}: {remark}." for row in table.rows for remark in row.remarks]
    return "\n".join([*lines, "", *remarks]).rstrip() + "\n"


def _lines(table: Table) -> list[str]:
    lines = ["| | " + " | ".join(column.title for column in table.columns) + " |"]
    lines.append("|---" * (len(table.columns) + 1) + "|")
    for row in table.rows:
        name = f"**{row.name}**" if row.is_method else row.name
        lines.append(f"| {name} | " + " | ".join(row.cell(column) for column in table.columns) + " |")
    return lines


def last_line(comparison: Comparison, table: Table) -> str:
    """The distance of one method over that of another, as `ratio` asks; why not, where one is not measured."""
    if comparison.ratio is None:
        return ""
    ours, theirs = (table.row(name) for name in comparison.ratio)
    between = f"{ours.name} over {theirs.name}"
    if not table.columns or any(table.columns[0].key not in row.spreads for row in (ours, theirs)):
        return f"{between}: not measured, as one of them has no finished run"
    column = table.columns[0]
    values = [row.spreads[column.key].mean for row in (ours, theirs)]
    shown = " / ".join(column.format.format(value) for value in values)
    return f"{between}, {column.title}: {values[0] / values[1]:.2f} ({shown})"
