"""A table of ratios says of each row whether it meets its bar, and its last line counts what it says."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[3] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("bench_harness", HARNESS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_harness"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_rows_are_judged_by_their_bar_and_counted(harness, capsys, tmp_path):
    rows = [
        harness.Row("search", "faiss", 2.8, 1.0, "s", 2.8),
        harness.Row("update", "SparseAdam", 0.0005, 0.001, "s", 1.0),
        harness.not_measured("1024 px", "no GPU here"),
    ]
    assert [row.verdict for row in rows] == ["meets", "falls short", "not measured"]
    on = harness.machine("A GPU (80 GB)")
    harness.report(rows, on, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "3 rows: 1 meets, 1 falls short, 1 not measured"
    assert [line.endswith(row.verdict) for row, line in zip(rows, printed[2:], strict=False)] == [True] * 3
    assert "0.5 ms" in printed[3]
    written = json.loads((tmp_path / f"a-gpu-80-gb-{on['date']}.json").read_text())
    assert [row["ratio"] for row in written["rows"]] == [2.8, 0.5, None]
    assert written["rows"][2]["verdict"] == "not measured"
    assert written["rows"][2]["theirs"] is None


def test_sides_take_turns_and_their_first_run_does_not_count(harness):
    calls, now = [], iter(range(1000))
    costs = {"ours": [50, 3, 2], "theirs": [50, 7, 9]}

    def side(name):
        def work():
            calls.append(name)
            clock.at += costs[name][calls.count(name) - 1]

        return work

    def clock():
        next(now)
        return clock.at

    clock.at = 0
    found = harness.least({name: side(name) for name in costs}, 2, clock)
    assert calls == ["ours", "theirs"] * 3
    assert found == {"ours": 2, "theirs": 7}


def test_a_ratio_without_a_figure_is_no_pass(harness):
    assert harness.Row("work", "other", math.nan, 1.0, "s").verdict == "not measured"
    assert harness.Row("work", "other", 1.0, math.nan, "s").verdict == "not measured"
