"""The end of a run: workers measure and draw, and the driver only writes. Nothing large goes through its memory."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from glann.config.run import Config
from glann.datasets.index import Index
from glann.errors import EnvironmentFault
from glann.inference.model import SamplingModel
from glann.inference.package import load_model
from glann.metrics.result import Result
from glann.reports.run_folder import MODEL
from glann.reports.sheets import Sheet, Tile
from glann.samplers.gaussian import gaussian
from glann.tracking.runs import TrackedRun
from glann.trainers.run import finish
from glann.trainers.run.evaluation import EVALUATION, Evaluated, draw_pictures
from glann.trainers.run.events import Phase
from glann.trainers.run.recovery import Groups, RunStopped
from glann.trainers.run.state import Position, Saved
from glann.trainers.stage import DONE
from PIL import Image
from registered_runs import make_config, make_run, networks

LARGE = np.zeros((300, 300, 3), np.uint8)


def test_the_driver_decodes_no_image(tmp_path, monkeypatch):
    """A head node has neither the memory nor the device for it."""
    monkeypatch.chdir(tmp_path)
    config: Config = make_config("x")
    make_run(config)
    index = Index.load(config.data.url, config.s3)
    generator, sampler = networks(config)
    saved = Saved(Position(DONE), {"generator": {"weights": generator}, "mapping": {"weights": sampler}})
    monkeypatch.setattr(finish.retention, "latest", lambda store: 1)
    monkeypatch.setattr(finish, "load", lambda *_: saved)

    def refuse(*_):
        raise AssertionError("an image is decoded in the driver")

    codes_ND = torch.nn.functional.normalize(torch.randn(50, config.generator.latent_dim), dim=1)
    drawn = {name: Sheet([("", [Tile.of(LARGE)])]) for name in ("samples", "interpolations", "nearest")}
    evaluated = Evaluated(1, gaussian(codes_ND), [Result("l1", 0.25)], drawn, 3.0, "2 x H100")
    tracked = TrackedRun.open(config, config.run_dir)
    with monkeypatch.context() as decoding:
        decoding.setattr(SamplingModel, "decode", refuse)
        finish.finish(config, index, tracked, {"train_s": 10.0}, evaluated)
    summary = finish.require_summary(config)
    assert summary["metrics"] == {"l1": 0.25}
    assert summary["made"]["hardware"] == "2 x H100"
    assert (summary["use"], summary["checkpoint"]) == ("last", 1)
    assert summary["timings"] == {"train_s": 7.0, "finish_s": 3.0}
    assert all((config.run_dir / "images" / f"{name}.png").exists() for name in drawn)
    with Image.open(config.run_dir / "images" / "samples" / "00-00.webp") as whole:
        assert whole.size == (300, 300)
    assert load_model(config.run_dir / MODEL).sample(2).shape == (2, 28, 28, 1)


def test_only_the_first_worker_draws_pictures(monkeypatch):
    model = SimpleNamespace(sample=lambda count: None)
    monkeypatch.setattr("glann.trainers.run.evaluation.nearest_images", lambda *_, **__: None)
    monkeypatch.setattr("glann.trainers.run.evaluation.drawn_from", lambda *_: {})
    assert draw_pictures(model, None, 4, None) == {}


def test_a_stop_during_the_evaluation_loses_nothing_and_says_so():
    groups = object.__new__(Groups)
    groups.stopping, groups.evaluating, groups.saved = "the run was stopped", True, 7
    with pytest.raises(RunStopped, match="before it was measured; it is trained and saved, and the same command"):
        groups.after_loss(EnvironmentFault("the evaluation was stopped"))
    assert Phase(EVALUATION) == Phase("evaluation")


STREAM = """
from pathlib import Path
import torch
from glann.metrics.panel import code_panel
from glann.metrics.spec import METRICS
from glann.metrics.team import Team
from glann.trainers.run.evaluation import gaussian_of

ROWS, DIM, BLOCK = 1_000_000, 64, 20_000

def codes(rows):
    for start in range(rows.start, rows.stop, BLOCK):
        yield torch.randn(min(BLOCK, rows.stop - start), DIM)

def peak():  # of this process alone: ru_maxrss starts with its parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
state = gaussian_of(codes, ROWS, Team())
panel = code_panel(METRICS[name] for name in ("precision_codes", "copying_codes"))
panel.tally(codes(range(ROWS)))
assert abs(float(state["root"].square().sum()) - DIM) < 1, state["root"].square().sum()
print((peak() - before) >> 10)
"""


def test_a_million_codes_are_streamed():
    """They take 244 MiB here, with their optimiser state three times that: they are never in memory as a whole."""
    done = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 240
