"""A new stage, sampler and metric are each one file and one table entry: they train, resume and are reported.

The toys are written into a copy of the package, as somebody who extends it would write them into theirs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from glann.cluster.jobs import shipping

STAGE = '''
"""A stage that nudges one number towards 1, an epoch a step."""

import torch

from ..models.comm import all_sum
from .stage import Stage, StageCost, StageInfo, StageStep


class Nudge(Stage):
    def __init__(self, context, networks):
        self.context, self.preview_every = context, 1
        held = networks.get("nudge")
        self.value = torch.zeros(1) if held is None else held["weights"]["value"].clone()

    @classmethod
    def info(cls, config):
        return StageInfo("nudge", "Nudge", 6)

    @classmethod
    def cost(cls, config, rows):
        return StageCost(6, 6.0)

    def steps(self, epoch, step, piggyback):
        self.context.enter("nudge")
        for number in range(epoch, 6):
            self.value += 0.5 * (1 - self.value)
            carried_K = all_sum(piggyback().to(self.context.device)).cpu()
            yield StageStep(number, 0, 1, carried_K, loss=float(1 - self.value), ends_epoch=True)

    def lazy_state(self):
        return {"nudge": {"weights": {"value": self.value.clone()}, "updates": 0.0}}

    def state(self):
        return self.lazy_state()


STAGE = Nudge
'''

SAMPLER = '''
"""A sampler that takes the mean code, plus noise of the configured size."""

import torch

from ..models.comm import all_sum
from ..models.mapping import NoiseToCode
from .base import FitStep, Sampler


class AroundMean(NoiseToCode):
    def __init__(self, latent_dim, spread):
        super().__init__()
        self.noise_dim, self.spread = latent_dim, spread
        self.register_buffer("mean", torch.zeros(latent_dim))

    def forward(self, e_BE):
        return torch.nn.functional.normalize(self.mean + self.spread * e_BE, dim=1)


class Mean(Sampler):
    title = "Around the mean"

    @staticmethod
    def build(config, latent_dim, constraint):
        return AroundMean(latent_dim, config.spread)

    def fit(self, codes, first_epoch, piggyback, enter=lambda phase: None):
        enter("mean")
        for epoch in range(first_epoch, 1):
            self.network.mean.copy_(all_sum(codes.z_nD.sum(0).to(self.device)) / codes.total)
            yield FitStep(epoch, 0, 1, all_sum(piggyback().to(self.device)).cpu(), True, {"loss": 0.5})


SAMPLER = Mean
'''

SAMPLER_ENTRY = """
from pydantic import create_model
SAMPLERS["mean"] = create_model(
    "MeanConfig", __base__=SamplerConfig, kind=(Literal["mean"], "mean"), spread=(float, 0.2)
)
"""


METRIC = '''
"""The largest difference of a pixel between an image and its reconstruction."""


def worst(fake_BCHW, real_BCHW):
    return (fake_BCHW.double() - real_BCHW.double()).abs().flatten(1).amax(1) / 255
'''

METRIC_ENTRY = """

from .worst import worst

METRICS["worst"] = Metric("worst", "Worst pixel", "largest difference of a pixel", "lower", "{:.3f}", Codes(worst))
"""


@pytest.fixture
def extended(tmp_path: Path, glann):
    """A copy of the package to be extended, and a function that runs its command in a folder with the digits."""
    package = shipping.stage_package(tmp_path)
    shutil.copytree(packed_digits(glann), tmp_path / "work" / "data" / "digits-28")

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "glann", *words],
            cwd=tmp_path / "work",
            env=glann.env | {"PYTHONPATH": str(tmp_path)} | env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return package, tmp_path / "work", run


def packed_digits(glann) -> Path:
    folder = glann.folder / "data" / "digits-28"
    if not folder.exists():
        done = glann("data", "pack", "digits", str(folder), "--resolution", "28", "--channels", "1")
        assert done.returncode == 0, done.stderr
    return folder


def insert(file: Path, before: str, text: str) -> None:
    source = file.read_text()
    assert source.count(before) == 1, before
    file.write_text(source.replace(before, text + before))


def without_its_end(work: Path, run_dir: Path, stage: str) -> None:
    """Take a finished run back to a checkpoint within a stage, as if it had been killed there."""
    for name in ("summary.json", "report.html"):
        (run_dir / name).unlink()
    kept = []
    for manifest in sorted((run_dir / "checkpoints").glob("step-*/manifest.json")):
        attempt = json.loads(manifest.read_text())["attempt"]
        position = json.loads((manifest.parent / attempt / "state.json").read_text())["position"]
        if kept or position["stage"] not in (stage, "glo"):
            shutil.rmtree(manifest.parent)
        elif position["stage"] == stage and position["epoch"] == 3:
            kept.append(position)
    assert kept or stage != "nudge", "no checkpoint within the stage"


def entries(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_toy_stage_sampler_and_metric_are_trained_resumed_and_reported(extended, glann):
    package, work, run = extended
    (package / "trainers" / "nudge.py").write_text(STAGE)
    insert(package / "config" / "methods.py", '"glann": (', '"nudged": ("glo", "nudge", "sampler"), ')
    (package / "samplers" / "mean.py").write_text(SAMPLER)
    insert(package / "config" / "samplers.py", "\n\ndef _tag(", SAMPLER_ENTRY)
    (package / "metrics" / "worst.py").write_text(METRIC)
    with (package / "metrics" / "spec.py").open("a") as table:
        table.write(METRIC_ENTRY)

    small = [value for value in glann.small if not value.startswith("imle.")]
    words = ["train", "digits", *small, "glo.epochs=2", "method=nudged", "sampler.kind=mean", "sampler.spread=0.3"]
    words += ["tracking.enabled=false", "checkpoint.keep=99"]
    plan = run(*words, "--dry-run")
    assert "stage 2 (Nudge)" in plan.stdout, plan.stderr
    done = run(*words)
    assert done.returncode == 0, done.stderr
    run_dir = work / "runs" / "digits"
    first = (run_dir / "model" / "sampler-mean.safetensors").read_bytes()
    losses = {e["epoch"]: e["loss"] for e in entries(run_dir) if e.get("stage") == "nudge"}
    assert losses == {epoch: pytest.approx(0.5**epoch) for epoch in range(1, 7)}
    report = (run_dir / "report.html").read_text()
    assert "Nudge for 6 epochs and Around the mean for 1 epoch" in report
    assert "Nudge: loss" in report
    card = (run_dir / "MODEL_CARD.md").read_text()
    assert "| sampler | mean |" in card
    measured = json.loads((run_dir / "summary.json").read_text())["metrics"]
    assert list(measured) == ["l1", "psnr", "worst", "fd_squeezenet", "gaussian/fd_squeezenet"]
    assert measured["l1"] < measured["worst"] <= 1
    assert f"| Worst pixel | {measured['worst']:.3f} | largest difference of a pixel; lower is better |" in card
    assert "Worst pixel" in report
    assert "Worst pixel" in done.stdout

    without_its_end(work, run_dir, "nudge")
    again = run(*words)
    assert again.returncode == 0, again.stderr
    assert "resuming from the checkpoint at stage 2 (Nudge), epoch 3" in again.stdout
    assert (run_dir / "model" / "sampler-mean.safetensors").read_bytes() == first
    resumed = [e["epoch"] for e in entries(run_dir) if e.get("stage") == "nudge"]
    assert resumed == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    sampled = run("sample", "runs/digits", "--n", "4", "--out", "toy.npz")
    assert sampled.returncode == 0, sampled.stderr
    baseline = run("sample", "runs/digits", "--n", "4", "--sampler", "gaussian", "--out", "gaussian.npz")
    assert baseline.returncode == 0, baseline.stderr


def test_a_kind_that_is_not_in_the_table_is_refused(extended, glann):
    _, _, run = extended
    done = run("train", "digits", "sampler.kind=mean", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: sampler.kind='mean' is not possible: input should be 'imle', 'gaussian'")
