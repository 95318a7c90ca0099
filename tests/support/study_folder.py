"""A study folder as `glann tune` leaves it, made up: values follow a formula, pictures are noise and stripes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from glann.reports import pictures
from glann.storage.journal import Journal
from glann.tuning.ledger import Ledger, Trial
from glann.tuning.study import StudyConfig

EPOCHS = 12
SPACE: dict[str, Any] = {
    "glo.latent_lr": {"log_uniform": [0.005, 0.1]},
    "glo.schedule.kind": {"choice": ["constant", "cosine"]},
    "glo.schedule.floor": {"uniform": [0.0, 0.5], "when": {"glo.schedule.kind": "cosine"}},
    "sampler.noise_dim": {"integer": [8, 32]},
    "sampler.statistics": {"choice": ["noise", "batch"]},
}
# What becomes of trials 0, 1, 2, ... unless a test says otherwise.
STATES = ["finished", "finished", "stopped", "finished", "failed", "finished"]
STATES += ["stopped", "finished", "finished", "stopped", "failed", "running"]


def make_study(studies_dir: Path, **changes: Any) -> StudyConfig:
    """A study with a folder that holds nothing but its study.yaml."""
    settings: dict[str, Any] = {
        "name": "digits-study",
        "studies_dir": str(studies_dir),
        "recipe": "digits",
        "overrides": {"glo.epochs": EPOCHS, "data.max_rows": 1500, "sampler.kind": "imle"},
        "space": SPACE,
        "metric": "fd_squeezenet",
        "search": {"seed": 3},
        "budget": {"trials": 12},
    }
    study = StudyConfig.model_validate(settings | changes)
    study.folder.mkdir(parents=True)
    (study.folder / "study.yaml").write_text(study.to_yaml())
    return study


def fill_study(study: StudyConfig, states: list[str] | None = None, seed: int = 0) -> list[Trial]:
    """Trials in these states, each with the run folder that such a trial has."""
    rng, ledger = random.Random(seed), Ledger(study.folder)
    for number, state in enumerate(states or STATES):
        trial = ledger.start(_params(study, rng) if number else {})
        fault = _distance(trial.params)
        epochs = {"finished": EPOCHS, "stopped": rng.choice([1, 3]), "failed": number % 3, "running": 5}[state]
        _run(study, trial, epochs, fault, finished=state == "finished")
        reached: dict[str, Any] = {"epoch": epochs, "loss": _loss(epochs, fault) if epochs else None}
        seconds = 20.0 + 40 * epochs
        if state == "finished":
            ledger.end(trial, seconds, state=state, value=fault, metrics={study.metric: fault, "psnr": 20.0}, **reached)
        elif state == "stopped":
            ledger.end(trial, seconds, state=state, **reached)
        elif state == "failed":
            ledger.end(trial, seconds, state=state, why="loss or gradients were not finite for 5 steps", **reached)
    ledger.close()
    return ledger.trials


def _params(study: StudyConfig, rng: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for key, dimension in study.space.items():
        if not dimension.holds(params):
            continue
        if dimension.choice is not None:
            params[key] = rng.choice(dimension.choice)
            continue
        low, high = dimension.bounds
        drawn = math.exp(rng.uniform(math.log(low), math.log(high))) if dimension.log else rng.uniform(low, high)
        params[key] = round(drawn) if dimension.kind.endswith("integer") else drawn
    return params


def _distance(params: dict[str, Any]) -> float:
    rate = params.get("glo.latent_lr", 0.03)
    return 0.25 + 0.1 * abs(math.log(rate / 0.02)) + 0.04 * (params.get("sampler.statistics", "batch") == "batch")


def _loss(epoch: int, fault: float) -> float:
    return 2 * fault + 3 / (1 + epoch)


def _run(study: StudyConfig, trial: Trial, epochs: int, fault: float, finished: bool) -> None:
    folder = study.run_dir(trial.number)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(study.trial(trial.number, trial.params).to_yaml())
    journal = Journal(folder / "metrics.jsonl")
    for epoch in range(1, epochs + 1):
        journal.append({"stage": "glo", "epoch": epoch, "step": 12 * epoch, "loss": _loss(epoch, fault)})
    if finished:
        for epoch in range(1, 6):
            journal.append({"stage": "imle", "epoch": epoch, "step": 1000 + epoch, "loss": 1 / epoch})
        (folder / "images").mkdir()
        image = np.random.default_rng(trial.number).integers(0, 256, (16, 28, 28, 1), dtype=np.uint8)
        image[:, :: trial.number + 2] //= 4
        pictures.grid(image).save(folder / "images" / "samples.png")
        (folder / "summary.json").write_text(json.dumps({"metrics": {study.metric: fault}, "rows": 1500}))
    journal.close()
