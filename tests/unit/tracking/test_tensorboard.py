"""`tracking.tensorboard` writes event files that TensorBoard reads, by the same names and steps as MLflow."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import numpy as np
import pytest
from glann.config.run import load
from glann.errors import UserError
from glann.reports import pictures
from glann.tracking import tensorboard
from glann.tracking.doctor import tracking
from glann.tracking.runs import TrackedRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def config(tmp_path: Path, *overrides: str):
    return load("digits", [f"runs_dir={tmp_path}", "name=night", "tracking.enabled=false", *overrides])


def read(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / tensorboard.FOLDER))
    found.Reload()
    return found


def test_numbers_and_pictures_by_stage_and_step(tmp_path: Path):
    chosen = config(tmp_path, "tracking.tensorboard=true")
    run = TrackedRun.open(chosen, chosen.run_dir)
    run.log_metrics({"stage": "glo", "epoch": 1, "loss": 0.5, "kind": "a word", "flag": True}, 40)
    run.log_metrics({"stage": "glo", "epoch": 2, "loss": float("nan")}, 80)
    (chosen.run_dir / "images").mkdir()
    picture = chosen.run_dir / "images" / "x.png"
    pictures.save(pictures.grid(np.zeros((4, 8, 8, 3), np.uint8)), picture)
    run.log_image(picture, "glo samples", 80)
    run.finish()
    found = read(chosen.run_dir)
    assert found.Tags()["scalars"] == ["glo/epoch", "glo/loss"]
    first = found.Scalars("glo/loss")[0]
    assert (first.step, first.value) == (40, 0.5)
    assert [event.step for event in found.Images("glo samples")] == [80]


def test_steps_that_a_restart_repeats_are_shown_once(tmp_path: Path):
    """A run that was killed comes back at its last checkpoint."""
    chosen = config(tmp_path, "tracking.tensorboard=true")
    for first in (1, 3):
        run = TrackedRun.open(chosen, chosen.run_dir)
        for step in range(first, first + 4):
            run.log_metrics({"stage": "glo", "loss": float(first)}, step)
        run.finish()
    values = {event.step: event.value for event in read(chosen.run_dir).Scalars("glo/loss")}
    assert values == {1: 1.0, 2: 1.0, 3: 3.0, 4: 3.0, 5: 3.0, 6: 3.0}
    assert len(read(chosen.run_dir).Scalars("glo/loss")) == 6


def test_there_are_none_unless_they_are_asked_for(tmp_path: Path):
    chosen = config(tmp_path)
    run = TrackedRun.open(chosen, chosen.run_dir)
    run.log_metrics({"stage": "glo", "loss": 0.5}, 1)
    run.finish()
    assert not (chosen.run_dir / tensorboard.FOLDER).exists()


def test_a_missing_package_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find = tensorboard.find_spec

    def missing(name: str) -> importlib.machinery.ModuleSpec | None:
        return None if name == "tensorboard" else find(name)

    monkeypatch.setattr(tensorboard, "find_spec", missing)
    chosen = config(tmp_path, "tracking.tensorboard=true")
    with pytest.raises(
        UserError, match=r"needs the package tensorboard .*: `pip install tensorboard`, or set"
    ) as caught:
        TrackedRun.open(chosen, chosen.run_dir)
    assert "\n" not in str(caught.value)
    first = next(tracking(chosen))
    assert (first.name, first.ok, first.remedy) == ("tensorboard", False, "pip install tensorboard"), (
        "by glann doctor too"
    )
    monkeypatch.undo()
    assert next(tracking(chosen)).ok
    assert next(tracking(config(tmp_path))).name != "tensorboard", "nobody asked for it"
