"""report.html, leaderboard.csv and seeds.yaml of a study."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ... import __version__
from ...config.run import redacted_config
from ...errors import redact
from ...reports.figures import metric_rows
from ...reports.page import Figure, environment, figure, write_page
from ...reports.run_folder import IMAGES, JOURNAL, REPORT
from ...storage import journal
from ...trainers.stage import stage_infos
from .. import ledger
from ..ledger import BASELINE, STATES, Trial
from ..space import Params
from ..study import StudyConfig
from .budget_curve import FEWEST, best_of_k_KQ
from .charts import Curve, best_of_so_many, loss_curves, values_over_trials
from .importance import FEW, Importance, best_count, importances
from .leaderboard import Row, as_csv, command, leaderboard, recipe_name, recipe_params, text
from .parallel import Line, parallel_coordinates
from .seeds import SEEDS_FILE, seeds_yaml

TABLE = "leaderboard.csv"
MAX_ROWS = 100
STATE_LABELS = {"running": "running", "finished": "finished", "stopped": "stopped early", "failed": "failed"}
SEARCHES = {
    "tpe": "a tree-structured Parzen estimator (TPE)",
    "random": "random search",
    "grid": "a grid of all combinations",
    "population": "population-based training",
}
TOO_FEW = "Left out: at least two finished trials are needed; there {}."


@dataclass(frozen=True)
class StudyFacts:
    """A study and its trials, read once. rows: ranked. base_params: values of the recipe for the keys of the space."""

    study: StudyConfig
    trials: dict[int, Trial]
    rows: list[Row]
    base_params: Params

    @classmethod
    def read(cls, study: StudyConfig) -> StudyFacts:
        """Read the folder of a study. Raises UserError if the ledger is damaged or the recipe cannot be read."""
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
        """Values of finished trials, by number."""
        return {row.trial.number: row.trial.value for row in self.rows if row.rank and row.trial.value is not None}

    def params(self, trial: Trial) -> Params:
        return self.base_params if trial.number == BASELINE else trial.params

    def role(self, trial: Trial) -> str:
        """How a trial is drawn: "best", "recipe" or "trial". The base recipe stays "recipe" even if it is the best."""
        if trial.number == BASELINE:
            return "recipe"
        return "best" if trial is self.best else "trial"

    def label(self, trial: Trial) -> str:
        return {"recipe": "recipe", "best": f"best: trial {trial.number}", "trial": ""}[self.role(trial)]


def write_report(study: StudyConfig) -> Path:
    """Write the report and the leaderboard of a study, whether or not any trial has finished.

    Raises:
        UserError: the ledger, or a file of a trial, is damaged.
        EnvironmentFault: the disk is full or failing.
    """
    facts = StudyFacts.read(study)
    write_page(study.folder / TABLE, as_csv(study, facts.rows))
    if facts.best not in (None, facts.base) and (again := seeds_yaml(study, facts.best)):
        write_page(study.folder / SEEDS_FILE, again)
    return write_page(study.folder / REPORT, render(facts))


def render(facts: StudyFacts) -> str:
    """The page as HTML."""
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
            seeds_command=f"glann compare {study.folder / SEEDS_FILE}" if (study.folder / SEEDS_FILE).exists() else "",
            shares_stage_one=study.second_stage_only,
            rows=[cells(facts, row) for row in facts.rows[:MAX_ROWS]],
            hidden=max(0, len(facts.rows) - MAX_ROWS),
            keys=list(study.space),
            table_file=TABLE,
            curves=curves(facts),
            stage=stage(facts)[1],
            values=value_chart(facts),
            budget=budget(facts),
            parallel=parallel(facts),
            importance=importance,
            importance_text=importance_text,
            study_yaml=redact(study.to_yaml()),
            recipe_yaml=redacted_config(study.base()).to_yaml(),
        )
    )


def headline(facts: StudyFacts) -> str:
    """One or two sentences on what is searched and how."""
    study = facts.study
    count = len(study.space)
    keys = "One key" if count == 1 else f"{count} keys"
    aim = "lowest" if study.minimize else "highest"
    base = f"the second stage of {study.stage_one}" if study.stage_one else f"recipe {recipe_name(study)}"
    early = " Trials with a poor loss are stopped early (ASHA)." if study.stops_early else ""
    return f"{keys} of {base}, searched for the {aim} {study.metric} by {SEARCHES[study.search.kind]}.{early}"


def progress(facts: StudyFacts) -> str:
    """One sentence on the number of trials and their states."""
    states = Counter(trial.state for trial in facts.trials.values())
    if not facts.trials:
        return "No trial has started."
    counts = ", ".join(f"{states[state]} {STATE_LABELS[state]}" for state in (*STATES[1:], STATES[0]) if states[state])
    return f"{len(facts.trials)} of {max(facts.study.budget.trials, len(facts.trials))} trials: {counts}." + (
        "" if facts.best else " None has a value yet."
    )


def tiles(facts: StudyFacts) -> list[tuple[str, str, str]]:
    """Headline figures (name, value, meaning): the best value, the base recipe's, and the gain."""
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
    luck = f"best of {others}, so partly chance: train it again with another seed"
    gained = gain(best.value, base.value, facts.study)
    return [*shown, ("Base recipe", base_value, "trial 0, unchanged"), ("Gained", gained, luck if others > 1 else "")]


def gain(best: float, base: float, study: StudyConfig) -> str:
    """Improvement of `best` over `base`: in the unit of the metric if it is in decibels, else relative."""
    difference = base - best if study.minimize else best - base
    if study.measured.decibels:
        return study.measured.format.format(difference)
    if not base:
        return f"{difference:.3g}"
    share = difference / abs(base)
    return f"{share:.1%}" if share >= 0.001 else "less than 0.1%"


def samples(facts: StudyFacts) -> list[tuple[str, str, Figure]]:
    """Sample images (name, value, picture) of the best trial and the base recipe, where they exist."""
    shown = []
    for trial in dict.fromkeys(trial.number for trial in (facts.best, facts.base) if trial):
        path = facts.study.run_dir(trial) / IMAGES / "samples.png"
        name = "Base recipe" if trial == BASELINE else f"Best: trial {trial}"
        value = facts.trials[trial].value
        if path.is_file():
            measured = f"{facts.study.metric} {value:.4g}" if value is not None else "not measured"
            shown.append((name, measured, figure(path, name)))
    return shown


def cells(facts: StudyFacts, row: Row) -> dict[str, object]:
    """Formatted cells of a row of the leaderboard."""
    trial = row.trial
    params = {key: text(value) for key, value in facts.params(trial).items()}
    return {
        "row": row,
        "is_best": trial is facts.best,
        "value": "–" if trial.value is None else f"{trial.value:.4g}",
        "params": [params.get(key, "–") for key in facts.study.space],
        "epoch": trial.epoch or "–",
        "loss": "–" if trial.loss is None else f"{trial.loss:.4g}",
        "state": STATE_LABELS[trial.state],
        "minutes": f"{trial.seconds / 60:.1f}" if trial.ended else "–",
        "why": redact(trial.why),
    }


def stage(facts: StudyFacts) -> tuple[str, str]:
    """The stage whose losses the curves show: (name in the journal, name on the page)."""
    base = facts.study.base()
    return (
        (base.sampler.kind, "stage 2") if facts.study.second_stage_only else (next(iter(stage_infos(base))), "stage 1")
    )


def curves(facts: StudyFacts) -> Markup | str:
    """Loss curves of all trials, or the reason why there are none."""
    name, label = stage(facts)
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
            values = [losses[epoch] for epoch in epochs]
            found.append(Curve(facts.role(trial), trial.state, facts.label(trial), epochs, values))
    return loss_curves(found, f"Loss of {label}") if found else "No trial has completed an epoch."


def value_chart(facts: StudyFacts) -> Markup | str:
    """Chart of the values of finished trials, or the reason why there is none."""
    study, values = facts.study, facts.values
    if len(values) < 2:
        return TOO_FEW.format("is one" if values else "is none")
    label = facts.label(facts.best) if facts.best else ""
    return values_over_trials(values, BASELINE, study.minimize, study.metric, "Value of every finished trial", label)


def budget(facts: StudyFacts) -> Markup | str:
    """Chart of what a budget of random trials buys, or the reason why there is none; a failed trial counts as worst."""
    study = facts.study
    if study.search.kind != "random" or study.stops_early:
        return (
            "Left out: the best of so many trials follows from trials that were drawn at random and trained to the end "
            "(search.kind=random, scheduler.kind=none)."
        )
    worst = math.inf if study.minimize else -math.inf
    drawn = [trial for trial in facts.trials.values() if trial.number != BASELINE and trial.ended]
    if len(drawn) < FEWEST:
        return f"Left out: at least {FEWEST} random trials are needed; there are {len(drawn)}."
    values = [facts.values.get(trial.number, worst) for trial in drawn]
    low_K, median_K, high_K = best_of_k_KQ(values, (0.1, 0.5, 0.9), study.minimize).T
    if not any(map(math.isfinite, median_K)):
        return "Left out: most random trials have failed."
    return best_of_so_many(low_K, median_K, high_K, study.metric, "The best of so many random trials")


def parallel(facts: StudyFacts) -> Markup | str:
    """Parallel coordinates, or the reason why they are left out."""
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
    """Importance of the keys and how to read it; or no keys and the reason."""
    valued = [(facts.params(facts.trials[number]), value) for number, value in facts.values.items()]
    try:
        found = importances(facts.study, valued)
    except ValueError as reason:
        return [], f"Left out. {reason}"
    best = best_count(len(valued))
    hint = f" With fewer than {FEW} trials this is only indicative." if len(valued) < FEW else ""
    return found, (
        f"PED-ANOVA: how much the distribution of a key differs between the best {best} and all {len(valued)} finished "
        f"trials; all shares add up to 100%.{hint}"
    )
