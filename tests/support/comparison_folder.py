"""A comparison's folder as `glann compare` leaves it, made up: no run is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from glann.metrics.prd import PrdCurve
from glann.tuning.compare.comparison import Cell, Comparison
from glann.tuning.compare.measure import REAL, save_curve, save_strip
from glann.tuning.ledger import Ledger

DISTANCE = "fd_lite0-96"
# distance to training and to held-out images, copying share, copying of codes: of seed 0, more by one for each seed
METHODS: dict[str, tuple[float, float, float, float]] = {
    "imle": (100.0, 110.0, 0.55, 0.60),
    "gmm": (60.0, 63.0, 0.58, 0.70),
    "ot": (31.0, 36.0, 0.91, 1.0),
}


def make_comparison(studies_dir: Path, **changes: Any) -> Comparison:
    """Three samplers on one stage 1 and a method of another recipe, which fails; two seeds."""
    settings: dict[str, Any] = {
        "name": "sides",
        "studies_dir": str(studies_dir),
        "recipe": "digits",
        "methods": {
            "imle": {"sampler.kind": "imle"},
            "gmm": {"sampler.kind": "gmm"},
            "ot": {"sampler.kind": "ot"},
            "published": {"recipe": "paper-mnist", "loss.network": "squeezenet"},
        },
        "seeds": [0, 1],
        "ratio": ["gmm", "imle"],
    }
    return Comparison.model_validate(settings | changes)


def fill_comparison(comparison: Comparison) -> None:
    """Two seeds of each method that is known above; the fourth fails with the first seed and waits with the second."""
    comparison.folder.mkdir(parents=True)
    (comparison.folder / "comparison.yaml").write_text(comparison.to_yaml())
    ledger, rng = Ledger(comparison.folder), np.random.default_rng(0)
    save_strip(comparison.folder, REAL, rng.integers(0, 256, (16, 28, 28, 1), dtype=np.uint8))
    for seed in comparison.seeds:
        for method, (training, held_out, share, codes) in METHODS.items():
            run = comparison.run(Cell(method, seed)).name
            metrics = {
                DISTANCE: training + 2 * seed,
                f"{DISTANCE}:held-out": held_out + 2 * seed,
                f"reconstruction/{DISTANCE}": 30.0,
                f"real/{DISTANCE}": 8.0,
                "copying_lite0-96:held-out": share,
                "copying_codes": codes,
                "fit_s": 12.0,
                "train_s": 200.0,
                "draws_per_s": 900.0,
            }
            trial = ledger.start({"method": method, "seed": seed})
            ledger.end(trial, 240.0, state="finished", metrics=metrics)
            slope = np.linspace(0, 1, 1001)
            save_curve(comparison.folder, run, PrdCurve(1 - slope**2, 1 - (1 - slope) ** 2))
            save_strip(comparison.folder, run, rng.integers(0, 256, (16, 28, 28, 1), dtype=np.uint8))
    trial = ledger.start({"method": "published", "seed": 0})
    ledger.end(trial, 9.0, state="failed", why="the budget of 4 minutes is spent at s3://me:hunter2@bucket/x")
    ledger.close()
