"""A new stage, sampler, metric, extractor and asset are each a file and a table entry, as docs/extending.md has them.

The code of that page is written into a copy of the package, as a reader would write it into theirs.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from doc_blocks import extend_package
from glann.cluster.jobs import shipping

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def extended(tmp_path: Path, glann):
    """A copy of the package to be extended, and a function that runs its command in a folder with the digits."""
    package = shipping.stage_package(tmp_path)
    shutil.copytree(packed_digits(glann), tmp_path / "work" / "data" / "mnist-10k")

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
    folder = glann.folder / "data" / "mnist-10k"
    if not folder.exists():
        done = glann("data", "pack", "mnist-10k", str(folder), "--resolution", "28", "--channels", "1")
        assert done.returncode == 0, done.stderr
    return folder


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


def test_the_stage_sampler_metric_and_extractor_of_the_page_are_trained_resumed_and_reported(extended, glann):
    package, work, run = extended
    extend_package(package, PAGE)

    small = [value for value in glann.small if not value.startswith(("imle.", "sampler."))]
    words = ["train", "digits", *small, "glo.epochs=2", "method=nudged", "sampler.kind=mean", "sampler.spread=0.3"]
    words += ["tracking.enabled=false", "checkpoint.keep=99", "evaluation.extractor=shallow"]
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
    of_samples = ["fd_shallow", "precision_shallow", "recall_shallow"]
    of_samples += [f"{name}:held-out" for name in (*of_samples, "copying_shallow")]
    bounds = [f"{bound}/fd_shallow{against}" for bound in ("real", "reconstruction") for against in ("", ":held-out")]
    assert list(measured) == [
        *("l1", "psnr", "worst", *bounds),
        *(*of_samples, *(f"gaussian/{name}" for name in of_samples)),
    ]
    assert measured["l1"] < measured["worst"] <= 1
    meaning = "largest difference of a pixel; lower is better; against training images"
    assert f"| Worst pixel | {measured['worst']:.3f} | {meaning} |" in card
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


def test_the_asset_of_the_page_is_packed(extended, tmp_path: Path):
    package, work, run = extended
    extend_package(package, PAGE)
    incoming = tmp_path / "cache" / "incoming" / "optdigits"
    incoming.mkdir(parents=True)
    published = resources.files("sklearn.datasets.data") / "digits.csv.gz"  # what the page's address has, too
    (incoming / "digits.csv").write_bytes(gzip.decompress(published.read_bytes()))
    words = ["data", "pack", "optdigits", "data/optdigits", "--resolution", "28", "--channels", "1"]
    done = run(*words, GLANN_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    index = json.loads((work / "data" / "optdigits" / "index.json").read_text())
    assert (index["rows"], index["resolution"], index["channels"]) == (1797, 28, 1)


def test_a_kind_that_is_not_in_the_table_is_refused(extended, glann):
    _, _, run = extended
    done = run("train", "digits", "sampler.kind=mean", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: sampler.kind='mean' is not possible: input should be 'imle', 'gaussian'")
