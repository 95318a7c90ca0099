"""A run that was stopped, or killed, and resumed says how long it took in all, and in how many starts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from glann.config.run import Config, load
from glann.reports.run import timing_rows
from glann.storage.journal import Journal
from glann.trainers.plan.evaluation import EvaluationCost
from glann.trainers.plan.remaining import Remaining, Work
from glann.trainers.run import log
from glann.trainers.run.events import CheckpointStarted, EpochDone
from glann.trainers.run.finish import summary_of
from glann.trainers.run.log import RunLog
from glann.trainers.run.telemetry import Telemetry
from glann.trainers.run.timings import Timings
from rich.console import Console

WORK = Work({"glo": 1e6, "imle": 5e5}, 1000, EvaluationCost(300, 0, 1e5, 10, 0))
DAY = 86400.0


def epoch(time: float, stage: str, number: int, seconds: float, **more: float) -> dict:
    return {"time": time, "stage": stage, "epoch": number, "step": 5 * number, "seconds": seconds} | more


KILLED = [
    {"time": 1000.0, "stage": "run", "event": "stages"},
    {"time": 1010.0, "stage": "run", "event": "started"},
    epoch(1040.0, "glo", 1, 30.0, checkpoint_stall_s=2.0, images_per_s=50.0),
    {"time": 1045.0, "stage": "glo/step", "step": 7, "images_per_s": 60.0},
    {"time": 1050.0, "stage": "glo/measured", "epoch": 1, "step": 5, "measuring_s": 4.0},
]
STOPPED = [
    {"time": DAY, "stage": "run", "event": "stages"},
    epoch(DAY + 40.0, "glo", 1, 31.0, checkpoint_stall_s=1.0, images_per_s=48.0),  # the same epoch once more
    epoch(DAY + 60.0, "imle", 1, 19.0),
    {"time": DAY + 61.0, "stage": "run", "event": "stopping"},
]


def test_a_start_lasts_to_its_last_entry_and_the_time_between_two_does_not_count():
    found = Timings.of_entries([*KILLED, *STOPPED])
    assert (found.starts, found.run_s) == (2, 50.0 + 61.0)
    assert found.stages == {"glo": 61.0, "imle": 19.0}
    assert (found.stall_s, found.measuring_s, found.images_per_s) == (3.0, 4.0, 48.0)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load("digits", ["sampler.kind=imle", "name=mine", f"runs_dir={tmp_path}", "tracking.enabled=false"])


def test_the_last_start_counts_with_those_before_it(config: Config, monkeypatch: pytest.MonkeyPatch):
    clock = [500.0]
    monkeypatch.setattr(log, "monotonic", lambda: clock[0])
    journal = Journal(config.run_dir / "metrics.jsonl")
    for entry in (*KILLED, *STOPPED):
        journal.append(entry)
    tracked = SimpleNamespace(journal=journal, log_metrics=lambda numbers, step: journal.append(numbers))
    run = RunLog(config, tracked, Console(quiet=True), Telemetry(config, Remaining(config, WORK)))  # type: ignore[arg-type]
    with run:
        assert run.timings()["images_per_s"] == 48.0, "a start that only measures has none of its own"
        run(CheckpointStarted(0.5))
        run(EpochDone("imle", 2, 10, {"loss": 0.25, "seconds": 20.0}))
        clock[0] += 25.0
    journal.close()
    assert run.timings() == {
        "starts": 3,
        "train_s": 50.0 + 61.0 + 25.0,
        "stage_1_s": 61.0,
        "stage_2_s": 39.0,
        "checkpoint_stall_s": 3.5,
        "measuring_s": 4.0,
        "images_per_s": 48.0,
    }
    assert ("starts", "3") in timing_rows(run.timings())
    assert Timings.of_journal(config.run_dir / "metrics.jsonl").starts == 3


@pytest.mark.parametrize(
    ("starts", "said"), [({}, "12.0 min\n"), ({"starts": 1}, "12.0 min\n"), ({"starts": 3}, "12.0 min in 3 starts")]
)
def test_the_end_of_the_command_says_in_how_many_starts(config: Config, starts: dict, said: str):
    """A summary of an earlier version does not know."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    summary = {"metrics": {"l1": 0.1}, "rows": 8, "timings": {"train_s": 720.0} | starts}
    (config.run_dir / "summary.json").write_text(json.dumps(summary))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary_of(config), soft_wrap=True)
    assert said in console.export_text().replace(" \n", "\n")
