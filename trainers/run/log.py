"""Output of a run during training: progress bar or plain lines, journal, MLflow and pictures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self, assert_never

import numpy as np
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ...config.run import Config
from ...reports import pictures
from ...reports.run_folder import IMAGES
from ...tracking.runs import TrackedRun
from ..stage import DONE, numbered, stage_infos
from . import events
from .evaluation import EVALUATION, Evaluated
from .events import Event
from .state import Position

if TYPE_CHECKING:
    from rich.console import Console


class RunLog:
    """Handler of the events of a run, in the driver. Use as a context manager."""

    def __init__(self, config: Config, tracked: TrackedRun, console: Console) -> None:
        self.config, self.tracked, self.console = config, tracked, console
        self.stages = stage_infos(config)
        self.began = monotonic()
        self.stalled = self.stalled_before = 0.0
        self.seconds = dict.fromkeys(self.stages, 0.0)
        self.images_per_s, self.serial = 0.0, 0
        self.workers, self.tenths = 1, 0
        self.evaluated: dict[int, tuple[int, int]] = {}  # images and their total by rank
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not draws_bars(console),
        )
        self.task = self.bar.add_task("starting the workers", total=None, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        stages = [{"name": info.name, "title": info.title} for info in self.stages.values()]
        self.note("stages", stages=stages)  # for readers of the folder, which do not import the stages
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        match event:
            case events.Progress():
                self.on_progress(event)
            case events.EpochDone():
                self.on_epoch(event)
            case events.Preview():
                self.on_preview(event)
            case events.CheckpointStarted():
                self.stalled += event.stall_s
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
                self.on_evaluating(event)
            case events.Joined() | events.Resumed() | Evaluated():  # used by the driver only
                pass
            case _:
                self.on_trouble(event)

    # Progress --------------------------------------------------------------------------------

    def on_progress(self, event: events.Progress) -> None:
        share = event.epoch + event.step / max(event.steps, 1)
        note = f"epoch {event.epoch + 1}/{self.stages[event.stage].epochs}"
        note += f"  loss {event.loss:.4f}" if event.loss is not None else ""
        self.advance(event.stage, share, note + speed(event.speed))

    def on_epoch(self, event: events.EpochDone) -> None:
        numbers: dict[str, object] = {"stage": event.stage, "epoch": event.epoch} | event.numbers
        self.tracked.log_metrics(numbers | {"checkpoint_stall_s": self.stalled - self.stalled_before}, event.serial)
        self.stalled_before, self.serial = self.stalled, event.serial
        self.seconds[event.stage] += event.numbers["seconds"]
        self.images_per_s = event.numbers.get("images_per_s", self.images_per_s)
        epochs = self.stages[event.stage].epochs
        note = f"epoch {event.epoch}/{epochs}  loss {event.numbers['loss']:.4f}" + speed(event.numbers)
        self.advance(event.stage, event.epoch, note)
        every = max(1, epochs // 10)
        if not draws_bars(self.console) and (event.epoch % every == 0 or event.epoch == epochs):
            self.console.print(f"{numbered(self.stages, event.stage)}  {note}  {event.numbers['seconds']:.1f} s")

    def on_evaluating(self, event: events.Evaluating) -> None:
        """Show the progress of all workers; without a terminal, a line for every tenth."""
        self.evaluated[event.rank] = event.images, event.total
        images, total = (sum(numbers) for numbers in zip(*self.evaluated.values(), strict=True))
        total = max(total, event.total * self.workers)  # of the workers that were not heard of yet
        note = f"{images:,} of {total:,} images"
        self.bar.update(self.task, description=EVALUATION, total=total, completed=images, note=note)
        tenths = 10 * images // max(total, 1)
        if not draws_bars(self.console) and tenths > self.tenths:
            self.tenths = tenths
            self.console.print(f"{EVALUATION}  {note}")

    def on_preview(self, event: events.Preview) -> None:
        for kind, images in event.pictures.items():
            if not len(images):
                continue
            path = self.config.run_dir / IMAGES / f"{event.stage}-epoch-{event.epoch:03d}-{kind}.png"
            self.save_picture(path, kind, images, event.stage)

    def save_picture(self, path: Path, kind: str, images: np.ndarray, stage: str) -> None:
        """Save a grid of samples [P, H, W, C] or of pairs [P, 2, H, W, C] to `path`, and track it at the last step."""
        path.parent.mkdir(exist_ok=True)
        picture = pictures.grid(images) if kind == "samples" else pictures.reconstructions(images[:, 0], images[:, 1])
        pictures.save(picture, path)
        self.tracked.log_image(path, f"{stage} {kind}", self.serial)

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
        self.workers, self.tenths, self.evaluated = event.workers, 0, {}
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
        """Seconds of this start of the run: in total, by stage, and of checkpoint stalls; and the last rate."""
        by_stage = {f"stage_{number}_s": self.seconds[name] for number, name in enumerate(self.stages, 1)}
        return {
            "train_s": monotonic() - self.began,
            **by_stage,
            "checkpoint_stall_s": self.stalled,
            "images_per_s": self.images_per_s,
        }

    def advance(self, stage: str, epochs_done: float, note: str) -> None:
        self.bar.update(
            self.task,
            description=numbered(self.stages, stage),
            total=self.stages[stage].epochs,
            completed=epochs_done,
            note=note,
        )

    def describe(self, place: Position) -> str:
        """Format a position of the run."""
        if place.stage == DONE:
            return "the end"
        return f"{numbered(self.stages, place.stage)}, epoch {place.epoch}, step {place.step}"

    def print(self, line: str) -> None:
        self.console.print(line)


def draws_bars(console: Console) -> bool:
    """Whether it can draw over what it has drawn: a terminal, or a notebook with what rich needs for that."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def speed(numbers: dict[str, float]) -> str:
    """Format throughput and utilisation, where measured."""
    words = f"  {numbers['images_per_s']:,.0f} img/s" if "images_per_s" in numbers else ""
    return words + (f"  {numbers['mfu']:.0%} MFU" if "mfu" in numbers else "")
