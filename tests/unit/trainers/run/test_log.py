"""Progress is one bar where it can be drawn, and lines where it cannot: a log file, or a notebook without widgets."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from glann.config.run import load
from glann.trainers.run import log
from glann.trainers.run.events import EpochDone
from glann.trainers.run.log import RunLog
from rich.console import Console


def shown(console: Console) -> list[str]:
    """What one epoch of the digits recipe prints beside the bar."""
    lines: list[str] = []
    console.print = lambda line, **options: lines.append(str(line))  # type: ignore[method-assign]
    tracked = SimpleNamespace(log_metrics=lambda numbers, step: None)
    RunLog(load("digits", ["glo.epochs=2"]), tracked, console)(EpochDone("glo", 1, 5, {"loss": 0.25, "seconds": 3.0}))
    return lines


def test_a_log_file_gets_lines():
    assert shown(Console(file=io.StringIO())) == ["stage 1 (GLO)  epoch 1/2  loss 0.2500  3.0 s"]


def test_a_terminal_gets_a_bar():
    assert shown(Console(file=io.StringIO(), force_terminal=True)) == []


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_gets_a_bar_if_it_can_draw_one(monkeypatch: pytest.MonkeyPatch, widgets: bool):
    monkeypatch.setattr(log, "find_spec", lambda name: object() if widgets else None)
    lines = shown(Console(file=io.StringIO(), force_jupyter=True))
    assert lines == ([] if widgets else ["stage 1 (GLO)  epoch 1/2  loss 0.2500  3.0 s"])
