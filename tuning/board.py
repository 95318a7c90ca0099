"""Console output of a running study: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ray import tune
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..trainers.stage import stage_infos
from .ledger import Ledger, Trial, best_of, format_params
from .not_pickled import NotPickled
from .scheduler import last_score
from .study import StudyConfig

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as RayTrial
    from rich.console import Console

ROWS = 12  # trials shown at once on a terminal
STYLES = {"finished": "green", "failed": "red", "stopped": "dim", "running": ""}


class Board(NotPickled, tune.Callback):
    """Ray Tune callback that prints the progress of a study. Use as a context manager around the study."""

    def __init__(self, study: StudyConfig, ledger: Ledger, console: Console) -> None:
        self.study, self.ledger, self.console = study, ledger, console
        self.stages = stage_infos(study.base())
        self.latest: dict[int, dict[str, Any]] = {}
        self.printed: set[tuple[int, str]] = {(trial.number, trial.state) for trial in ledger.trials if trial.ended}
        self.running, self.total = 0, study.trials_in_all
        self.live = Live(console=console, refresh_per_second=2, transient=True, get_renderable=self.screen)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()
        self.print_changes()

    # Callbacks of Ray Tune ------------------------------------------------------------------

    def on_step_begin(self, iteration: int, trials: list[RayTrial], **info: object) -> None:
        self.running = sum(trial.status == "RUNNING" for trial in trials)
        self.print_changes()

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: object
    ) -> None:
        if "number" in result:
            self.latest[result["number"]] = result

    # Output ---------------------------------------------------------------------------------

    def print_changes(self) -> None:
        """Print a line for every trial that started or ended since the last call; on a terminal only ended ones."""
        for trial in self.ledger.trials:
            if (trial.number, trial.state) in self.printed:
                continue
            self.printed.add((trial.number, trial.state))
            if trial.ended or not self.console.is_terminal:
                self.console.print(self.line(trial), highlight=False, soft_wrap=True)

    def line(self, trial: Trial) -> str:
        """The line printed when a trial starts or ends."""
        values = format_params(trial.params)
        if not trial.ended:
            return f"trial {trial.number:<3} starts     {values}"
        best = self.best()
        mark = "  best so far" if best is not None and best.number == trial.number else ""
        return f"trial {trial.number:<3} {trial.state:10} {self.result(trial)}  {values}{mark}"

    def result(self, trial: Trial) -> str:
        """Result of an ended trial: its value, how far it came, or why it failed."""
        if trial.state == "finished":
            return f"{self.study.metric} {trial.value:.4g}"
        if trial.state == "stopped" and self.study.scheduler.by == "score":
            return last_score(self.study, self.study.run_dir(trial.number)) or "early"
        if trial.state == "stopped":
            return f"after epoch {trial.epoch}, loss {trial.loss:.4g}" if trial.loss is not None else "early"
        return trial.why

    def best(self) -> Trial | None:
        return best_of(self.ledger.trials, self.study.minimize)

    def screen(self) -> Group:
        """Live table with one line per trial; on a narrow terminal long text is cut, numbers are not."""
        trials = self.ledger.trials
        table = Table(box=None, pad_edge=False)
        for column in ("trial", "state", self.study.metric):
            table.add_column(column, no_wrap=True)
        for column in ("so far", "values"):
            table.add_column(column)
        for trial in self.shown(trials):
            table.add_row(
                str(trial.number),
                Text(trial.state, STYLES[trial.state]),
                f"{trial.value:.4g}" if trial.value is not None else "",
                one_line(self.progress(trial)),
                one_line(format_params(trial.params)),
            )
        return Group(one_line(self.title(trials)), table)

    def shown(self, trials: list[Trial]) -> list[Trial]:
        """The trials that fit: running ones, then the latest of the others, always including the best."""
        running = [trial for trial in trials if not trial.ended]
        others = [trial for trial in trials if trial.ended][::-1][: max(0, ROWS - len(running))]
        best = self.best()
        return running[:ROWS] + ([best] if best is not None and best not in others else []) + others

    def progress(self, trial: Trial) -> str:
        if trial.ended:
            return self.result(trial) if trial.state != "finished" else f"{trial.seconds / 60:.1f} min"
        now = self.latest.get(trial.number, {})
        epoch = f", epoch {now['stage_epoch']}" if "stage_epoch" in now else ""
        loss = f", loss {now['reached_loss']:.4g}" if "reached_loss" in now else ""
        stages, stage = list(self.stages), now.get("stage", "starting")
        where = f"stage {stages.index(stage) + 1}" if stage in stages else stage
        return where + epoch + loss

    def title(self, trials: list[Trial]) -> str:
        ended = [trial for trial in trials if trial.ended]
        best = self.best()
        text = f"{self.study.name}: {len(ended)} of {self.total} trials"
        text += f", best {best.value:.4g} (trial {best.number})" if best is not None else ""
        left = self.seconds_left(ended)
        return text + (f", about {max(1, round(left / 60))} min left" if left is not None else "")

    def seconds_left(self, ended: list[Trial]) -> float | None:
        """Estimate of the remaining time, from the mean time of ended trials and the number running in parallel."""
        seconds = [trial.seconds for trial in ended if trial.seconds]
        if not seconds:
            return None
        left = self.total - len(ended)
        if left <= 0:
            return None
        return left * statistics.fmean(seconds) / max(1, self.running)


def one_line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")
