"""What a comparison measures of a finished run, besides what the run has measured itself.

That is the curve of precision and recall, a strip of samples, and the speed of drawing.

Legend: N images, A angles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...config.run import Config
from ...inference.model import SamplingModel
from ...inference.package import open_model
from ...metrics.judge import Judge, build_judge
from ...metrics.prd import PrdCurve, compare_distributions
from ...metrics.reference import open_images
from ...metrics.spec import measured_with
from ...metrics.tally import KeptFeatures
from ...reports import pictures
from ...reports.facts import RunFacts
from ...storage.files import read_document, write_whole
from .comparison import Comparison

Metrics = dict[str, float]
STRIP = 16  # images of a strip
TIMED = 500  # images that are drawn to measure the speed
POINTS = 101  # of a curve that is kept
FIT_S, TRAIN_S, DRAWS = "fit_s", "train_s", "draws_per_s"  # beside the keys of metrics
CURVES, STRIPS = "curves", "strips"  # folders of a comparison
REAL = "real"  # name of the strip of training images


@dataclass(frozen=True)
class Bench:
    """Measures the finished runs of a comparison, all alike."""

    folder: Path
    judge: Judge  # of the curve of precision and recall; runs measure their numbers themselves

    @classmethod
    def build(cls, comparison: Comparison, base: Config) -> Bench:
        """Read the training images once."""
        evaluation = base.evaluation
        measured = measured_with(evaluation.extractor, evaluation.metrics)
        curve = [metric for metric in measured if metric.group == "prd"]
        return cls(comparison.folder, build_judge(base, open_images(base), curve, evaluation.samples))

    def draw_real(self, base: Config) -> None:
        """Write the strip of training images, evenly spaced."""
        images = open_images(base)
        rows = np.linspace(0, len(images) - 1, min(STRIP, len(images))).astype(int)
        save_strip(self.folder, REAL, np.stack([images.decode(row).transpose(1, 2, 0) for row in rows.tolist()]))

    def measure(self, config: Config) -> Metrics:
        """The speed of drawing of a run; its curve and its strip are written under its name."""
        _, model = open_model(config.run_dir, s3=config.s3)
        drawn = self.judge.tally(model)
        kept = next((name for name in drawn.by_metric if name.startswith("f8_")), None)
        if kept is not None:
            real = cast(KeptFeatures, self.judge.real.whole.by_metric[kept])
            save_curve(self.folder, config.name, compare_distributions(real, cast(KeptFeatures, drawn.by_metric[kept])))
        save_strip(self.folder, config.name, model.sample(STRIP))
        return {DRAWS: speed(model)}


def speed(model: SamplingModel) -> float:
    """Images that are drawn in a second: noise, codes and pixels, on all threads of this process."""
    model.sample(STRIP)
    began = perf_counter()
    model.sample(TIMED)
    return TIMED / (perf_counter() - began)


def seconds_of(config: Config) -> dict[str, float]:
    """Seconds of training of each stage of a run, over all its starts; empty where there is no run."""
    if not (config.run_dir / "config.yaml").exists():
        return {}
    return {stage.name: stage.seconds for stage in RunFacts.read(config.run_dir).stages}


def save_strip(folder: Path, name: str, img_NHWC: NDArray[np.uint8]) -> None:
    (folder / STRIPS).mkdir(exist_ok=True)
    pictures.save(pictures.grid(img_NHWC, columns=STRIP), folder / STRIPS / f"{name}.png", durable=False)


def save_curve(folder: Path, name: str, curve: PrdCurve) -> None:
    (folder / CURVES).mkdir(exist_ok=True)
    chosen_A = np.linspace(0, len(curve.precision_A) - 1, POINTS).astype(int)
    tree = {"precision": curve.precision_A[chosen_A].tolist(), "recall": curve.recall_A[chosen_A].tolist()}
    write_whole(folder / CURVES / f"{name}.json", json.dumps(tree), durable=False)


def read_curve(folder: Path, name: str) -> tuple[list[float], list[float]] | None:
    """Precision and recall of a curve that was kept; None where there is none."""
    try:
        tree: Any = json.loads(read_document(folder / CURVES / f"{name}.json"))
        return [float(value) for value in tree["precision"]], [float(value) for value in tree["recall"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
