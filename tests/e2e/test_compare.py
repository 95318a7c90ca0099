"""A comparison from the command line: killed, it makes what is not done; a method that fails is a row."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import yaml
from mlflow import MlflowClient

COMPARISON = {
    "name": "sides",
    "recipe": "digits",
    "overrides": {
        "cluster.workers": 1,
        "engine.zero": 0,
        "data.max_rows": 300,
        "generator.width": 8,
        "generator.latent_dim": 8,
        "loss.kind": "l1",
        "glo.epochs": 3,
        "glo.batch_size": 40,
        "preview.every_epochs": 100,
    },
    "methods": {
        "imle": {"sampler.kind": "imle", "sampler.epochs": 3, "sampler.noise_dim": 8},
        "broken": {"sampler.kind": "coupling", "sampler.lr": 1e30},
        "ot": {"sampler.kind": "ot", "sampler.extension": "none"},
    },
    "ratio": ["ot", "imle"],
    "evaluation": {"extractor": "squeezenet", "samples": 60, "metrics": ["prd", "codes"]},
}
pytestmark = pytest.mark.timeout(600)


def lines(folder) -> list[dict]:
    path = folder / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


@pytest.mark.matrix
def test_a_comparison_that_is_killed_makes_what_is_not_done_and_shares_its_stage_1(glann):
    (glann.folder / "sides.yaml").write_text(yaml.safe_dump(COMPARISON, sort_keys=False))
    folder, deadline = glann.folder / "studies" / "sides", time.monotonic() + 300
    process = glann.start("compare", "sides.yaml")
    while not any(line["event"] == "ended" for line in lines(folder)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, lines(folder)
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len([line for line in lines(folder) if line["event"] == "ended"]) == 1

    done = glann("compare", "sides.yaml")
    assert done.returncode == 0, done.stderr
    ended = {line["params"]["method"]: line for line in lines(folder) if line["event"] == "ended"}
    assert {method: line["state"] for method, line in ended.items()} == {
        "imle": "finished",
        "broken": "failed",
        "ot": "finished",
    }
    assert len([line for line in lines(folder) if line["event"] == "ended"]) == 3, "what was done is not made again"
    assert "not finite" in ended["broken"]["why"]

    stages = [
        json.loads(line)["stage"] for line in (folder / "runs/sides-ot-0/metrics.jsonl").open() if '"stage"' in line
    ]
    assert "ot" in stages
    assert "glo" not in stages, "stage 1 was trained once"
    same = ["reconstruction/fd_squeezenet", "l1", "real/fd_squeezenet"]
    assert [ended["ot"]["metrics"][key] for key in same] == [ended["imle"]["metrics"][key] for key in same]
    assert ended["ot"]["metrics"]["draws_per_s"] > 0

    printed = done.stdout
    for part in ("| **imle** |", "| **broken** |", "reconstructions of imle", "broken: seed 0 failed: ", "COPIES"):
        assert part in printed, part
    assert printed.splitlines()[-1].startswith("ot over imle, Fréchet distance (squeezenet), held-out: ")
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 3
    assert page.count("<svg") == 1

    client = MlflowClient(f"sqlite:///{glann.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("glann").experiment_id], "tags.`glann.study` = 'sides'")
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {
        run.data.tags["glann.method"] for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert children == {"imle", "broken", "ot"}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        "report.html",
        "table.md",
        "comparison.yaml",
    }
