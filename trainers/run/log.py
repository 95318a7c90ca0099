"""Output of a run during training: progress bar and lines, journal, MLflow and pictures."""

from __future__ import annotations

from contextlib import ExitStack
from statistics import fmean
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self, assert_never

from rich.markup import escape

from ...config.run import Config
from ...metrics.result import from_key
from ...metrics.spec import METRICS
from ...reports.run_folder import IMAGES, JOURNAL
from ...reports.status import health, progress
from ...reports.status_bar import StatusBar, draws_bars
from ...tracking.runs import TrackedRun
from ..stage import DONE, numbered, stage_infos
from . import events
from .assembly import Assembly
from .evaluation import Evaluated
from .events import Event
from .heartbeat import repeated
from .measuring import entry_of
from .state import Position
from .telemetry import Telemetry
from .timings import BEGINS, Timings

if TYPE_CHECKING:
    from rich.console import Console


LINE_EVERY_S = 55.0  # without a terminal there is a line a minute, whatever happens
TRACKED_WORKERS = 32  # whose devices MLflow has series of
SYSTEM_EVERY_S = 60.0  # between entries of a worker's device
EPOCH_LINES = 20  # of a stage with short epochs; every epoch has one that takes longer than `LINE_EVERY_S`


class RunLog:
    """Handler of the events of a run, in the driver. Use as a context manager.

    Args:
        telemetry: has taken every event into account before it is handled here.
    """

    def __init__(self, config: Config, tracked: TrackedRun, console: Console, telemetry: Telemetry) -> None:
        self.config, self.tracked, self.console, self.telemetry = config, tracked, console, telemetry
        self.stages = stage_infos(config)
        self.began = self.printed_at = monotonic()
        self.earlier, self.now = Timings.of_journal(config.run_dir / JOURNAL), Timings(starts=1)
        self.stalled_before = 0.0
        self.images_per_s, self.serial = self.earlier.images_per_s, 0
        self.tenths = 0
        self.samples: dict[int, list[dict[str, float]]] = {}  # by rank
        self.sampled_at: dict[int, float] = {}
        self.previews = Assembly()
        self.bar, self.draws, self.held = StatusBar(console), draws_bars(console), ExitStack()

    def __enter__(self) -> Self:
        if self.draws:
            self.held.enter_context(self.bar)
        else:
            self.held.enter_context(repeated(self.print_now_and_then, 1.0, "log-lines"))
        stages = [{"name": info.name, "title": info.title} for info in self.stages.values()]
        self.note(BEGINS, stages=stages)  # for readers of the folder, which do not import the stages
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.held.close()

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        match event:
            case events.EpochDone():
                self.on_epoch(event)
            case events.StepsDone():
                self.serial = event.serial
                self.tracked.log_metrics({"stage": f"{event.stage}/step"} | event.numbers, event.serial)
            case events.DeviceSampled():
                self.on_device(event)
            case events.Measured():
                self.on_measured(event)
            case events.Preview():
                self.on_preview(event)
            case events.CheckpointStarted():
                self.now.stall_s += event.stall_s
            case events.Phase():
                self.note("phase", phase=event.phase)
            case events.BadStep():
                self.on_bad_step(event)
            case events.Warned():
                self.note("warning", of=event.stage, text=event.text)
                self.print(f"[yellow]warning[/]: {escape(event.text)}")
            case events.CheckpointDamaged():
                self.print(f"[yellow]damaged checkpoint[/] of step {event.step} is skipped: {escape(event.reason)}")
            case events.Training():
                self.on_training(event)
            case events.Evaluating():
                self.on_evaluating()
            case events.Progress() | events.CheckpointSaved():
                pass  # on the bar
            case events.Joined() | events.Resumed() | Evaluated():  # used by the driver only
                pass
            case _:
                self.on_trouble(event)
        if self.draws:
            self.bar.show(self.telemetry.status())

    # Progress --------------------------------------------------------------------------------

    def on_epoch(self, event: events.EpochDone) -> None:
        numbers: dict[str, object] = {"stage": event.stage, "epoch": event.epoch} | event.numbers
        self.tracked.log_metrics(numbers | {"checkpoint_stall_s": self.now.stall_s - self.stalled_before}, event.serial)
        self.stalled_before, self.serial = self.now.stall_s, event.serial
        self.now.stages[event.stage] = self.now.stages.get(event.stage, 0.0) + event.numbers["seconds"]
        self.images_per_s = event.numbers.get("images_per_s", self.images_per_s)
        epochs = self.stages[event.stage].epochs
        due = event.epoch % max(1, epochs // EPOCH_LINES) == 0 or event.epoch == epochs
        if due or monotonic() - self.printed_at >= LINE_EVERY_S:
            self.print_status(f"  {event.numbers['seconds']:.1f} s/epoch")

    def on_device(self, event: events.DeviceSampled) -> None:
        """Track the means of a minute under the names of MLflow's system metrics, by worker."""
        if event.use.rank >= TRACKED_WORKERS:
            return  # status.json has all
        if not (self.config.tracking.system_metrics and self.telemetry.current.workers):
            return  # before the first step nobody knows which step it is
        rank, now = event.use.rank, monotonic()
        samples = self.samples.setdefault(rank, [])
        samples.append(event.numbers)
        if now - self.sampled_at.get(rank, -SYSTEM_EVERY_S) >= SYSTEM_EVERY_S:
            means = {name: fmean(sample[name] for sample in samples) for name in event.numbers}
            self.tracked.log_metrics({"stage": f"system/worker-{rank}"} | means, self.serial)
            self.sampled_at[rank] = now
            samples.clear()

    def on_measured(self, event: events.Measured) -> None:
        self.now.measuring_s += event.seconds
        numbers: dict[str, object] = {"stage": entry_of(event.stage), "epoch": event.epoch} | event.numbers
        best = {} if event.best is None else {"best_step": event.best.step, "best": event.best.value}
        self.tracked.log_metrics(numbers | best | {"measuring_s": event.seconds}, event.serial)
        shown = ", ".join(f"{key} {METRICS[from_key(key).metric].format.format(v)}" for key, v in event.numbers.items())
        self.print(f"{numbered(self.stages, event.stage)}  epoch {event.epoch}  {shown}")
        if event.found is None:
            self.print("[yellow]not finite[/]: this checkpoint cannot be the best")
        elif event.best == event.found:
            self.print(f"the best checkpoint so far: {escape(str(event.best))}")

    def on_evaluating(self) -> None:
        """Print a line for every tenth."""
        images, total = self.telemetry.current.images or (0, 1)
        if (tenths := 10 * images // total) > self.tenths:
            self.tenths = tenths
            self.print_status()

    def on_preview(self, event: events.Preview) -> None:
        """Save the pictures once all workers have sent their part, and track them."""
        for kind, sheet in self.previews.add(event).items():
            path = self.config.run_dir / IMAGES / f"{event.stage}-epoch-{event.epoch:03d}-{kind}.png"
            path.parent.mkdir(exist_ok=True)
            sheet.save(path)
            self.tracked.log_image(path, f"{event.stage} {kind}", event.serial)

    def on_bad_step(self, event: events.BadStep) -> None:
        rows = ", ".join(str(row) for row in event.rows[:8]) + (" ..." if len(event.rows) > 8 else "")
        self.print(
            f"[yellow]not finite[/] at epoch {event.epoch + 1}, step {event.step}, worker {event.rank}: "
            "the step was not applied" + (f" (rows {rows})" if rows else "")
        )

    # Starts, restarts and faults -------------------------------------------------------------

    def on_training(self, event: events.Training) -> None:
        """Report the first step of a group; after a restart the event has `why` and `gap_s`."""
        restarted, place = event.why is not None, event.position
        self.tenths, self.serial = 0, place.serial if place else self.serial
        self.previews.clear()
        facts = {"workers": event.workers, "why": event.why, "gap_s": event.gap_s}
        known = {key: value for key, value in facts.items() if value is not None}
        self.note(
            "restarted" if restarted else "resumed" if place else "started",
            **known,
            place=vars(place) if place else {},
        )
        workers = f"{event.workers} worker{'s' if event.workers > 1 else ''}"
        if restarted:
            where = f"from the checkpoint at {self.describe(place)}" if place else "from the beginning"
            self.print(f"training again with {workers} {where} after {event.gap_s or 0:.0f} s")
        elif place:
            self.print(f"resuming from the checkpoint at {self.describe(place)} with {workers}")

    def on_trouble(
        self,
        event: events.WorkersLost | events.NodeDraining | events.CapacityFound | events.Waiting | events.Stopping,
    ) -> None:
        match event:
            case events.WorkersLost():
                self.note("lost", why=event.why)
                self.print(f"[yellow]lost[/]: {escape(event.why)}; starting the workers again")
            case events.NodeDraining():
                self.note("leaving", node=event.node)
                then = "resuming elsewhere" if event.resumes else "stopping, because this command runs there"
                self.print(f"node {event.node} is being taken away: saving, then {then}")
            case events.CapacityFound():
                self.note("room", workers=event.workers)
                self.print(f"there is room for {event.workers} workers: they start after the next checkpoint")
            case events.Waiting():
                self.note("waiting", held=event.ready, needed=event.needed)
                limit = self.config.cluster.start_timeout_s
                found = f"room for {event.ready} of {event.needed} workers"
                self.print(f"{found}; waiting for more, for up to {limit:g} s")
            case events.Stopping():
                self.note("stopping")
                self.print("saving, then stopping (press Ctrl-C again to stop at once, without saving)")
            case _:
                assert_never(event)

    def note(self, event: str, **facts: object) -> None:
        """Append an entry of the pseudo-stage `run`, which has no step, to the journal."""
        self.tracked.journal.append({"stage": "run", "event": event} | facts)

    def timings(self) -> dict[str, float]:
        """Seconds of all starts of the run, whose number is the first entry: in total, by stage, of checkpoint stalls
        and of measurements; and the last rate.
        """
        before, now = self.earlier, self.now
        by_stage = {
            f"stage_{number}_s": before.stages.get(name, 0.0) + now.stages.get(name, 0.0)
            for number, name in enumerate(self.stages, 1)
        }
        return {
            "starts": before.starts + now.starts,
            "train_s": before.run_s + monotonic() - self.began,
            **by_stage,
            "checkpoint_stall_s": before.stall_s + now.stall_s,
            "measuring_s": before.measuring_s + now.measuring_s,
            "images_per_s": self.images_per_s,
        }

    def describe(self, place: Position) -> str:
        """Format a position of the run."""
        if place.stage == DONE:
            return "the end"
        return f"{numbered(self.stages, place.stage)}, epoch {place.epoch}, step {place.step}"

    def print_status(self, more: str = "") -> None:
        """Print how the run stands."""
        status = self.telemetry.status()
        words = "  ".join(word for word in (status.stage, progress(status) + more, health(status)) if word)
        self.print(escape(words))

    def print_now_and_then(self) -> None:
        """Print how the run stands if nothing was printed for a while."""
        if monotonic() - self.printed_at >= LINE_EVERY_S:
            self.print_status()

    def print(self, line: str) -> None:
        self.printed_at = monotonic()
        self.console.print(line, soft_wrap=True, highlight=False)
