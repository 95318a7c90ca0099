"""Progress is a bar where it can be drawn, and lines that stay: epochs everywhere, and one a minute in a log file."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from glann.cluster.checkpoints.best import Best
from glann.config.run import load
from glann.reports import status_bar
from glann.reports.status import DeviceUse
from glann.trainers.plan.evaluation import EvaluationCost
from glann.trainers.plan.remaining import Remaining, Work
from glann.trainers.run import log
from glann.trainers.run.events import DeviceSampled, EpochDone, Evaluating, Measured, Progress, StepsDone, Training
from glann.trainers.run.log import RunLog
from glann.trainers.run.state import Position
from glann.trainers.run.telemetry import Telemetry
from rich.console import Console

WORK = Work({"glo": 1e6, "imle": 5e5}, 1000, EvaluationCost(300, 0, 1e5, 10, 0))
LINE = "stage 1 (GLO)  epoch 1/2  loss 0.2500  3.0 s/epoch"


class Log:
    """The log of a run of the digits recipe, and what it prints beside the bar."""

    def __init__(self, console: Console, epochs: int = 2) -> None:
        self.lines: list[str] = []
        console.print = lambda line, **options: self.lines.append(str(line))  # type: ignore[method-assign]
        self.tracked: list[tuple[dict, int]] = []
        tracked = SimpleNamespace(log_metrics=lambda numbers, step: self.tracked.append((numbers, step)))
        tracked.journal = SimpleNamespace(append=lambda entry: None)
        config = load("digits", ["sampler.kind=imle", f"glo.epochs={epochs}"])
        self.telemetry = Telemetry(config, Remaining(config, WORK))
        self.log = RunLog(config, tracked, console, self.telemetry)  # type: ignore[arg-type]

    def __call__(self, event) -> None:
        self.telemetry(event)
        self.log(event)


def shown(console: Console) -> list[str]:
    """What one epoch prints beside the bar."""
    log = Log(console)
    log(EpochDone("glo", 1, 5, {"loss": 0.25, "seconds": 3.0}))
    return log.lines


@pytest.mark.parametrize("terminal", [False, True])
def test_an_epoch_stays_in_a_log_file_and_in_the_scroll_back(terminal: bool):
    assert shown(Console(file=io.StringIO(), force_terminal=terminal)) == [LINE]


def test_many_short_epochs_are_not_a_line_each_and_long_ones_are(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(log, "monotonic", lambda: clock[0])
    run = Log(Console(file=io.StringIO()), epochs=200)
    for epoch in range(1, 101):
        run(EpochDone("glo", epoch, epoch, {"loss": 0.25, "seconds": 0.1}))
    assert len(run.lines) == 10
    for epoch in range(101, 111):
        clock[0] += 60
        run(EpochDone("glo", epoch, epoch, {"loss": 0.25, "seconds": 60.0}))
    assert len(run.lines) == 20


def test_a_long_epoch_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch):
    """In the log of a job that takes hours, somebody must see that it works and how long it will take."""
    clock = [0.0]
    monkeypatch.setattr(log, "monotonic", lambda: clock[0])
    run = Log(Console(file=io.StringIO()))
    run(Progress("glo", 0, 3, 1000, 0.25, {"images_per_s": 1004.0}))
    for _ in range(180):
        clock[0] += 1
        run.log.print_now_and_then()
    assert run.lines == ["stage 1 (GLO)  epoch 1/2  loss 0.2500  1,004 img/s"] * 3


def test_an_evaluation_has_a_line_for_every_tenth():
    run = Log(Console(file=io.StringIO()))
    run.telemetry.update(workers=2)
    for images in range(0, 101, 5):
        for rank in range(2):
            run(Evaluating(rank, images, 100))
    assert len(run.lines) == 10
    assert run.lines[0].startswith("evaluation  20 of 200 images")


def test_steps_and_devices_are_tracked_under_names_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """MLflow shows `system/...` as system metrics; every worker has its own."""
    clock = [0.0]
    monkeypatch.setattr(log, "monotonic", lambda: clock[0])
    run = Log(Console(quiet=True))

    def sample(rank: int, percent: float) -> DeviceSampled:
        use = DeviceUse(rank=rank, node="a", device="CPU", gpu=False, use=1.0, memory=1, total=2)
        return DeviceSampled(use, {"cpu_utilization_percentage": percent})

    run(sample(0, 10.0))
    assert run.tracked == [], "nothing is trained yet, so there is no step"
    run(Training(2, Position("glo", serial=200)))
    for second in range(0, 71, 10):
        clock[0] = second
        run(sample(0, float(second)))
        run(sample(1, 50.0))
    run(StepsDone("glo", 300, {"loss": 0.5, "images_per_s": 100.0}))
    assert run.tracked == [
        ({"stage": "system/worker-0", "cpu_utilization_percentage": 0.0}, 200),
        ({"stage": "system/worker-1", "cpu_utilization_percentage": 50.0}, 200),
        ({"stage": "system/worker-0", "cpu_utilization_percentage": 35.0}, 200),
        ({"stage": "system/worker-1", "cpu_utilization_percentage": 50.0}, 200),
        ({"stage": "glo/step", "loss": 0.5, "images_per_s": 100.0}, 300),
    ]


def test_a_terminal_gets_a_bar_with_all_that_is_known():
    console, run = Console(file=io.StringIO(), force_terminal=True, width=140), Log(Console(quiet=True))
    run(Progress("glo", 0, 500, 1000, 0.25, {"images_per_s": 1004.0, "mfu": 0.34}))
    with status_bar.StatusBar(console) as bar:
        bar.show(run.telemetry.status())
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "stage 1 (GLO)" in drawn
    assert "epoch 1/2  loss 0.2500  1,004 img/s  34% MFU" in drawn


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_gets_a_bar_if_it_can_draw_one(monkeypatch: pytest.MonkeyPatch, widgets: bool):
    monkeypatch.setattr(status_bar, "find_spec", lambda name: object() if widgets else None)
    assert status_bar.draws_bars(Console(file=io.StringIO(), force_jupyter=True)) == widgets


def test_what_a_checkpoint_measured_has_a_line_and_an_entry_beside_that_of_its_epoch():
    """An entry of the same stage and step would take the place of the epoch's."""
    held = {"metric": "fd_squeezenet", "better": "lower", "sampler": "gaussian", "samples": 100, "stage": "glo"}
    log = Log(Console(file=io.StringIO()))
    best, worse = (Best(step=step, value=value, epoch=step, **held) for step, value in ((1, 1.5), (2, 2.5)))
    for found in (best, worse):
        log(Measured("glo", found.epoch, found.step, {"gaussian/fd_squeezenet": found.value}, found, best, 0.5))
    log(Measured("glo", 3, 3, {"gaussian/fd_squeezenet": float("nan")}, None, best, 0.5))
    lines = [
        "stage 1 (GLO)  epoch 1  gaussian/fd_squeezenet 1.5",
        "the best checkpoint so far: step-000001, fd_squeezenet 1.5 after epoch 1 of glo",
        "stage 1 (GLO)  epoch 2  gaussian/fd_squeezenet 2.5",
        "stage 1 (GLO)  epoch 3  gaussian/fd_squeezenet nan",
        "[yellow]not finite[/]: this checkpoint cannot be the best",
    ]
    assert log.lines == lines
    entry, step = log.tracked[1]
    assert (entry["stage"], entry["gaussian/fd_squeezenet"], entry["best_step"], step) == ("glo/measured", 2.5, 1, 2)
    assert log.log.timings()["measuring_s"] == 1.5
