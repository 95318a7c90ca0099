"""The tutorial's figures are those of the plan, and its costs are hours times prices."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from glann.config.run import load
from glann.trainers.plan.estimate import make_plan
from glann.tuning.load import load_study
from rich.console import Console

PAGE = (Path(__file__).parents[3] / "docs" / "tutorial-celebahq.md").read_text(encoding="utf-8")
COLUMNS = ("gpu", "gpu_hours", "hours", "price", "cost")


@pytest.fixture(scope="module")
def plan():
    return make_plan(load("celebahq-1024"))


def test_the_table_of_costs_is_that_of_the_plan(plan):
    table = PAGE.split("| GPU | GPU-hours |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [dict(zip(COLUMNS, line.strip("| ").split(" | "), strict=True)) for line in table]
    assert [row["gpu"].partition(" (")[0] for row in rows] == ["A10G", "A100 80 GB", "H100 SXM"]
    known = {estimate.device: estimate for estimate in plan.estimates}
    for row in rows:
        estimate = known[row["gpu"].partition(" (")[0]]
        assert estimate.workers == 8
        assert float(row["gpu_hours"]) == round(estimate.device_hours, 1)
        assert float(row["hours"]) == round(estimate.hours, 1)
        if row["price"].startswith("$"):
            assert row["cost"] == f"${float(row['gpu_hours']) * float(row['price'][1:]):.0f}"


def test_the_study_that_is_shown_can_be_started(tmp_path: Path):
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "faces-rates.yaml").write_text(text)
    study = load_study(tmp_path / "faces-rates.yaml", overrides=["data.url=s3://BUCKET/celebahq-1024"])
    assert study.name in PAGE.split("glann submit ")[2].split("\n")[0]


def test_the_lines_of_the_plan_are_its_own(plan):
    [shown] = re.findall(r"```text\n(workers .*?)```", PAGE, re.DOTALL)
    console = Console(width=200, file=io.StringIO())
    console.print(plan)
    printed = {" ".join(line.split()) for line in console.file.getvalue().splitlines()}
    assert {" ".join(line.split()) for line in shown.splitlines()} <= printed
