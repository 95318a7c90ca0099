"""What a run says while it goes on: one bar or plain lines, the journal and MLflow, and pictures."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ...config.run import Config
from ...reports import pictures
from ...reports.run_folder import IMAGES
from ...tracking.runs import TrackedRun

if TYPE_CHECKING:
    from rich.console import Console

STAGES = {"glo": "stage 1 (GLO)", "imle": "stage 2 (IMLE)"}


class RunLog:
    """Takes the events of the workers, in the driver. Use as a context manager."""

    def __init__(self, config: Config, tracked: TrackedRun, console: Console) -> None:
        self.config, self.tracked, self.console = config, tracked, console
        self.epochs = {"glo": config.glo.epochs, "imle": config.imle.epochs}
        self.began = monotonic()
        self.stalled = self.stalled_before = 0.0
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.images_per_s = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("starting the workers", total=None, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Handle one event; kinds are the methods below."""
        getattr(self, f"on_{event['kind']}")(event)

    def on_progress(self, event: dict[str, Any]) -> None:
        stage = event["stage"]
        share = event["epoch"] + event["step"] / max(event["steps"], 1)
        note = f"epoch {event['epoch'] + 1}/{self.epochs[stage]}"
        note += f"  loss {event['loss']:.4f}" if "loss" in event else ""
        self.advance(stage, share, note + speed(event))

    def on_epoch(self, event: dict[str, Any]) -> None:
        numbers = {key: value for key, value in event.items() if key not in ("kind", "rank", "step")}
        self.tracked.log_metrics(numbers | {"checkpoint_stall_s": self.stalled - self.stalled_before}, event["step"])
        self.stalled_before = self.stalled
        stage, epoch = event["stage"], event["epoch"]
        self.seconds[stage] += event["seconds"]
        self.images_per_s = event.get("images_per_s", self.images_per_s)
        note = f"epoch {epoch}/{self.epochs[stage]}  loss {event['loss']:.4f}"
        note += speed(event)
        self.advance(stage, epoch, note)
        every = max(1, self.epochs[stage] // 10)
        if not self.console.is_terminal and (epoch % every == 0 or epoch == self.epochs[stage]):
            self.console.print(f"{STAGES[stage]}  {note}  {event['seconds']:.1f} s")

    def on_preview(self, event: dict[str, Any]) -> None:
        for kind, images in event["pictures"].items():
            if not len(images):
                continue
            path = self.config.run_dir / IMAGES / f"{event['stage']}-epoch-{event['epoch']:03d}-{kind}.png"
            self.save_picture(path, kind, images)

    def save_picture(self, path: Path, kind: str, images: np.ndarray) -> None:
        """Draw a grid of samples [P, H, W, C] or of pairs [P, 2, H, W, C] into `path`, and have it tracked."""
        path.parent.mkdir(exist_ok=True)
        picture = pictures.grid(images) if kind == "samples" else pictures.reconstructions(images[:, 0], images[:, 1])
        pictures.save(picture, path)
        self.tracked.log_image(path)

    def on_checkpoint(self, event: dict[str, Any]) -> None:
        self.stalled += event["stall_s"]

    # What befalls the run ----------------------------------------------------------------------

    def on_going(self, event: dict[str, Any]) -> None:
        """The workers of a group have taken their first step; after a restart with `why` and `gap_s`."""
        restarted, place = "why" in event, event["from"]
        facts = {key: event[key] for key in ("workers", "why", "gap_s") if key in event}
        self.note("restarted" if restarted else "resumed" if place else "started", **facts, place=place)
        workers = f"{event['workers']} worker{'s' if event['workers'] > 1 else ''}"
        if restarted:
            where = f"from the checkpoint at {in_words(place)}" if place else "from the beginning"
            self.say(f"training again with {workers} {where} after {event['gap_s']:.0f} s")
        elif place:
            self.say(f"going on from the checkpoint at {in_words(place)} with {workers}")

    def on_lost(self, event: dict[str, Any]) -> None:
        self.note("lost", why=event["why"])
        self.say(f"[yellow]lost[/]: {escape(event['why'])}; starting the workers again")

    def on_leaving(self, event: dict[str, Any]) -> None:
        self.note("leaving", node=event["node"])
        then = "going on elsewhere" if event["goes_on"] else "stopping, because this command runs there"
        self.say(f"node {event['node']} is being taken away: saving, then {then}")

    def on_room(self, event: dict[str, Any]) -> None:
        self.note("room", workers=event["workers"])
        self.say(f"there is room for {event['workers']} workers: they start after the next checkpoint")

    def on_waiting(self, event: dict[str, Any]) -> None:
        self.note("waiting", held=event["held"], needed=event["needed"])
        limit = self.config.cluster.start_timeout_s
        self.say(f"room for {event['held']} of {event['needed']} workers; waiting for more, for up to {limit:g} s")

    def on_phase(self, event: dict[str, Any]) -> None:
        self.note("phase", phase=event["phase"])

    def note(self, event: str, **facts: Any) -> None:
        """Into the journal, as an entry of the stage `run` that belongs to no step."""
        self.tracked.journal.append({"stage": "run", "event": event} | facts)

    def on_damaged(self, event: dict[str, Any]) -> None:
        self.say(f"[yellow]damaged checkpoint[/] of step {event['step']} is passed over: {event['reason']}")

    def on_bad_step(self, event: dict[str, Any]) -> None:
        rows = ", ".join(str(row) for row in event["rows"][:8]) + (" ..." if len(event["rows"]) > 8 else "")
        self.say(
            f"[yellow]not finite[/] at epoch {event['epoch'] + 1}, step {event['step']}, worker {event['rank']}: "
            f"the step was not applied (rows {rows})"
        )

    def on_stopping(self, event: dict[str, Any]) -> None:
        self.note("stopping")
        self.say("saving, then stopping (press Ctrl-C again to stop at once, without saving)")

    def timings(self) -> dict[str, float]:
        """Seconds of this start of the run: as a whole, by stage, and lost to checkpoints; last rate."""
        return {
            "train_s": monotonic() - self.began,
            "stage_1_s": self.seconds["glo"],
            "stage_2_s": self.seconds["imle"],
            "checkpoint_stall_s": self.stalled,
            "images_per_s": self.images_per_s,
        }

    def advance(self, stage: str, epochs_done: float, note: str) -> None:
        self.bar.update(
            self.task, description=STAGES[stage], total=self.epochs[stage], completed=epochs_done, note=note
        )

    def say(self, line: str) -> None:
        self.console.print(line)


def in_words(place: dict[str, Any]) -> str:
    """A position of `resume.Position`."""
    if place["stage"] == "done":
        return "the end"
    return f"{STAGES[place['stage']]}, epoch {place['epoch']}, step {place['step']}"


def speed(event: dict[str, Any]) -> str:
    """Throughput and utilisation in words, where an event has them."""
    words = f"  {event['images_per_s']:,.0f} img/s" if "images_per_s" in event else ""
    return words + (f"  {event['mfu']:.0%} MFU" if "mfu" in event else "")
