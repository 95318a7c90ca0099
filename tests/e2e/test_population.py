"""Population-based training from the command line: those that do badly go on from a copy of one that does well."""

from __future__ import annotations

import json

import pytest
import yaml
from glann.tuning.ledger import trials
from ray_head import ray_head

# Long enough for members to reach their changes one after another: an epoch takes half a second.
NAME, TRIALS, EPOCHS, INTERVAL = "crowd", 5, 48, 4
BOUNDS = {"glo.latent_lr": (1e-6, 0.1), "glo.generator_lr": (1e-6, 0.01)}
STUDY = {
    "name": NAME,
    "recipe": "digits",
    "overrides": {
        "cluster.workers": 1,
        "data.max_rows": 600,
        "generator.width": 8,
        "generator.latent_dim": 8,
        "loss.kind": "l1",
        "glo.epochs": EPOCHS,
        "glo.batch_size": 40,
        "sampler.kind": "imle",
        "sampler.epochs": 2,
        "sampler.noise_dim": 8,
        "preview.every_epochs": 100,
        "evaluation.samples": 50,
        "checkpoint.keep": 20,  # so quick a member has gone on by more than a few before another starts from it
        "tracking.enabled": False,
    },
    "space": {key: {"log_uniform": list(bounds)} for key, bounds in BOUNDS.items()},
    "metric": "fd_squeezenet",
    "search": {"kind": "population", "interval": INTERVAL, "seed": 1},
    "budget": {"trials": TRIALS},
}
pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1200)]


def test_a_population_changes_its_members_and_all_of_them_finish(glann):
    (glann.folder / "crowd.yaml").write_text(yaml.safe_dump(STUDY))
    with ray_head(cpus=TRIALS) as head:
        done = glann("tune", "crowd.yaml", timeout=900, **head.env | {"RAY_ADDRESS": head.cluster})
    assert done.returncode == 0, done.stdout + done.stderr
    folder = glann.folder / "studies" / NAME
    ended = trials(folder)
    assert [trial.state for trial in ended.values()] == ["finished"] * TRIALS
    assert all(trial.epoch == EPOCHS for trial in ended.values())
    assert ended[0].params == {}, "the base recipe is not one of them"
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    begun = {line["trial"]: line["params"] for line in lines if line["event"] == "started"}
    moved = [number for number in range(1, TRIALS) if ended[number].params != begun[number]]
    assert moved, "nobody went on from a copy of another"
    for number in moved:
        for key, (low, high) in BOUNDS.items():
            assert low <= ended[number].params[key] <= high
        run = yaml.safe_load((folder / "trials" / f"{NAME}-{number:04d}" / "config.yaml").read_text())
        assert run["glo"]["latent_lr"] == pytest.approx(ended[number].params["glo.latent_lr"])
