"""report.html of a study, beside it leaderboard.csv: what was searched, what it found, and how to train it again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ... import __version__
from ...config.run import redacted_config
from ...errors import redact
from ...reports.page import Figure, environment, figure, write_page
from ...reports.run import metric_rows
from ...reports.run_folder import IMAGES, JOURNAL, REPORT
from ...storage import journal
from .. import ledger
from ..ledger import BASELINE, STATES, Trial
from ..space import Params
from ..study import StudyConfig
from .charts import Curve, loss_curves, values_over_trials
from .importance import FEW, Importance, best_count, importances
from .leaderboard import Row, as_csv, command, leaderboard, recipe_name, recipe_params, text
from .parallel import Line, parallel_coordinates

TABLE = "leaderboard.csv"
MAX_ROWS = 100
STATE_WORDS = {"running": "running", "finished": "finished", "stopped": "stopped early", "failed": "failed"}
SEARCHES = {
    "tpe": "a tree-structured Parzen estimator (TPE)",
    "random": "random search",
    "grid": "a grid of all combinations",
    "population": "population-based training",
}
TOO_FEW = "Left out: it takes at least two finished trials, there {}."


@dataclass(frozen=True)
class StudyFacts:
    """A study and its trials, read once. rows: from best to worst. base_params: the recipe's, for keys of the space."""

    study: StudyConfig
    trials: dict[int, Trial]
    rows: list[Row]
    base_params: Params

    @classmethod
    def read(cls, study: StudyConfig) -> StudyFacts:
        """Raises UserError where the ledger is damaged or the recipe cannot be read."""
        trials = ledger.trials(study.folder)
        return cls(study, trials, leaderboard(study, trials.values()), recipe_params(study))

    @property
    def best(self) -> Trial | None:
        return self.rows[0].trial if self.rows and self.rows[0].rank == 1 else None

    @property
    def base(self) -> Trial | None:
        return self.trials.get(BASELINE)

    @property
    def values(self) -> dict[int, float]:
        """Of finished trials, by number."""
        return {row.trial.number: row.trial.value for row in self.rows if row.rank and row.trial.value is not None}

    def params(self, trial: Trial) -> Params:
        return self.base_params if trial.number == BASELINE else trial.params

    def role(self, trial: Trial) -> str:
        """What it is drawn as. A base recipe that is the best is drawn as itself."""
        if trial.number == BASELINE:
            return "recipe"
        return "best" if trial is self.best else "trial"

    def label(self, trial: Trial) -> str:
        return {"recipe": "recipe", "best": f"best: trial {trial.number}", "trial": ""}[self.role(trial)]


def write_report(study: StudyConfig) -> Path:
    """Write the report and the table of a study, whether or not anything has finished.

    Raises:
        UserError: the ledger, or a file of a trial, is damaged.
        EnvironmentFault: the disk is full or failing.
    """
    facts = StudyFacts.read(study)
    write_page(study.folder / TABLE, as_csv(study, facts.rows))
    return write_page(study.folder / REPORT, render(facts))


def render(facts: StudyFacts) -> str:
    """The page as text."""
    study = facts.study
    importance, importance_text = important(facts)
    return (
        environment(Path(__file__).parent)
        .get_template("study.html")
        .render(
            study=study,
            version=__version__,
            headline=headline(facts),
            progress=progress(facts),
            tiles=tiles(facts),
            samples=samples(facts),
            command=command(study, facts.best) if facts.best else "",
            shares_stage_one=study.second_stage_only,
            rows=[cells(facts, row) for row in facts.rows[:MAX_ROWS]],
            hidden=max(0, len(facts.rows) - MAX_ROWS),
            keys=list(study.space),
            table_file=TABLE,
            curves=curves(facts),
            stage=stage(facts)[1],
            values=value_chart(facts),
            parallel=parallel(facts),
            importance=importance,
            importance_text=importance_text,
            study_yaml=redact(study.to_yaml()),
            recipe_yaml=redacted_config(study.base()).to_yaml(),
        )
    )


def headline(facts: StudyFacts) -> str:
    """What is searched, in a sentence or two."""
    study = facts.study
    count = len(study.space)
    keys = "One key" if count == 1 else f"{count} keys"
    aim = "lowest" if study.minimize else "highest"
    base = f"the second stage of {study.stage_one}" if study.stage_one else f"recipe {recipe_name(study)}"
    early = " Trials that fall behind are stopped early (ASHA)." if study.stops_early else ""
    return f"{keys} of {base}, searched for the {aim} {study.metric} by {SEARCHES[study.search.kind]}.{early}"


def progress(facts: StudyFacts) -> str:
    """How many trials there are, and what became of them."""
    states = Counter(trial.state for trial in facts.trials.values())
    if not facts.trials:
        return "No trial has started."
    told = ", ".join(f"{states[state]} {STATE_WORDS[state]}" for state in (*STATES[1:], STATES[0]) if states[state])
    return f"{len(facts.trials)} of {max(facts.study.budget.trials, len(facts.trials))} trials: {told}." + (
        "" if facts.best else " None has a value yet."
    )


def tiles(facts: StudyFacts) -> list[tuple[str, str, str]]:
    """(name, value, meaning): the best, the base recipe, and what lies between."""
    best, base = facts.best, facts.base
    if best is None or best.value is None:
        return []
    name, value, meaning = metric_rows({facts.study.metric: best.value})[0]
    shown = [(f"Best {name}", value, "the base recipe" if best is base else f"trial {best.number}; {meaning}")]
    if base is None or base.value is None or base.state != "finished":
        return [*shown, ("Base recipe", "–", "it has not finished, so there is nothing to compare with")]
    _, base_value, base_meaning = metric_rows({facts.study.metric: base.value})[0]
    if best is base:
        return [(shown[0][0], value, base_meaning), ("Gained", "nothing", "no trial is better than the base recipe")]
    others = len(facts.values) - 1
    luck = f"the best of {others}: part of it is luck, so train it again with another seed"
    gained = gain(best.value, base.value, facts.study)
    return [*shown, ("Base recipe", base_value, "trial 0, unchanged"), ("Gained", gained, luck if others > 1 else "")]


def gain(best: float, base: float, study: StudyConfig) -> str:
    """How much better one value is than another, as a share where that means something."""
    difference = base - best if study.minimize else best - base
    if study.measured.decibels:
        return study.measured.format.format(difference)
    if not base:
        return f"{difference:.3g}"
    share = difference / abs(base)
    return f"{share:.1%}" if share >= 0.001 else "less than 0.1%"


def samples(facts: StudyFacts) -> list[tuple[str, str, Figure]]:
    """(name, value, picture) of the best trial and of the base recipe, as far as they were drawn."""
    shown = []
    for trial in dict.fromkeys(trial.number for trial in (facts.best, facts.base) if trial):
        path = facts.study.run_dir(trial) / IMAGES / "samples.png"
        name = "Base recipe" if trial == BASELINE else f"Best: trial {trial}"
        value = facts.trials[trial].value
        if path.is_file():
            told = f"{facts.study.metric} {value:.4g}" if value is not None else "not measured"
            shown.append((name, told, figure(path, name)))
    return shown


def cells(facts: StudyFacts, row: Row) -> dict[str, object]:
    """A line of the table, in words."""
    trial = row.trial
    params = {key: text(value) for key, value in facts.params(trial).items()}
    return {
        "row": row,
        "is_best": trial is facts.best,
        "value": "–" if trial.value is None else f"{trial.value:.4g}",
        "params": [params.get(key, "–") for key in facts.study.space],
        "epoch": trial.epoch or "–",
        "loss": "–" if trial.loss is None else f"{trial.loss:.4g}",
        "state": STATE_WORDS[trial.state],
        "minutes": f"{trial.seconds / 60:.1f}" if trial.ended else "–",
        "why": redact(trial.why),
    }


def stage(facts: StudyFacts) -> tuple[str, str]:
    """The stage whose losses tell trials apart: (as in the journal, in words)."""
    return ("imle", "stage 2") if facts.study.second_stage_only else ("glo", "stage 1")


def curves(facts: StudyFacts) -> Markup | str:
    """The losses of all trials over the epochs; or why there are none."""
    name, words = stage(facts)
    found = []
    for trial in facts.trials.values():
        entries = journal.entries(facts.study.run_dir(trial.number) / JOURNAL)
        losses = {
            entry["epoch"]: float(entry["loss"])
            for entry in entries
            if entry.get("stage") == name and "epoch" in entry and isinstance(entry.get("loss"), int | float)
        }
        if losses:
            epochs = sorted(losses)
            told = [losses[epoch] for epoch in epochs]
            found.append(Curve(facts.role(trial), trial.state, facts.label(trial), epochs, told))
    return loss_curves(found, f"Loss of {words}") if found else "No trial has ended an epoch."


def value_chart(facts: StudyFacts) -> Markup | str:
    """The values of finished trials; or why there are none."""
    study, values = facts.study, facts.values
    if len(values) < 2:
        return TOO_FEW.format("is one" if values else "is none")
    label = facts.label(facts.best) if facts.best else ""
    return values_over_trials(values, BASELINE, study.minimize, study.metric, "Value of every finished trial", label)


def parallel(facts: StudyFacts) -> Markup | str:
    """Parallel coordinates; or why they would say nothing."""
    if len(facts.study.space) < 2:
        return "Left out: with one key there is nothing to combine."
    lines = [
        Line(facts.role(row.trial), facts.label(row.trial), facts.params(row.trial), row.trial.value)
        for row in facts.rows
        if row.rank and row.trial.value is not None
    ]
    if len(lines) < 2:
        return TOO_FEW.format("is one" if lines else "is none")
    return parallel_coordinates(facts.study, lines, "Values that went together")


def important(facts: StudyFacts) -> tuple[list[Importance], str]:
    """The bars, and what they mean; or none, and why."""
    valued = [(facts.params(facts.trials[number]), value) for number, value in facts.values.items()]
    try:
        found = importances(facts.study, valued)
    except ValueError as reason:
        return [], f"Left out. {reason}"
    best = best_count(len(valued))
    hint = f" From fewer than {FEW} trials it is a hint, no finding." if len(valued) < FEW else ""
    return found, (
        f"PED-ANOVA: how differently a key is spread among the best {best} and among all {len(valued)} finished "
        f"trials; all shares add up to 100%.{hint}"
    )
