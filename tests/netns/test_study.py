"""A submitted study on real nodes: a worker node is lost, then the head, and a new cluster completes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_job import OVERRIDES
from cluster_nodes import BUCKET, HEAD, WORKERS, Cluster
from glann.cluster.jobs import shipping
from glann.config.run import load
from glann.tuning import shared
from glann.tuning.load import load_study
from netns import wait_until

# The limit is for a machine that does other things too.
pytestmark = [pytest.mark.netns, pytest.mark.matrix, pytest.mark.timeout(1800)]
NAME, TRIALS = "rates", 3


class SubmittedStudy:
    """What `glann submit` sends, started on the head as Ray's job server would."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.log = cluster, cluster.logs / "study.log"
        recipe, file = cluster.logs / "my-recipe.yaml", cluster.logs / "study.yaml"
        recipe.write_text(load("digits", [*OVERRIDES, "glo.epochs=20", "cluster.workers=1"]).to_yaml())
        space = {"glo.latent_lr": {"log_uniform": [0.005, 0.1]}}
        tree = {"name": NAME, "recipe": str(recipe), "space": space, "metric": "fd_squeezenet"}
        tree |= {"search": {"kind": "random"}, "scheduler": {"kind": "none"}, "budget": {"trials": TRIALS}}
        file.write_text(yaml.safe_dump(tree))
        self.study = shared.for_cluster(load_study(file))
        self.base = shipping.for_cluster(self.study.base())
        recipe.unlink()  # the head has none

    def start(self) -> Any:
        """Start it, as on a cluster of which the head is new."""
        sent = self.cluster.desk / "sent"
        shutil.rmtree(sent, ignore_errors=True)
        sent.mkdir()
        shipping.stage_run(sent, self.base, self.study.to_yaml())
        words = ("sh", "-c", f"cd sent/run && {shipping.entrypoint(NAME)}")
        with self.log.open("ab") as log:
            self.process = self.cluster.net.start(HEAD, *words, env=self.cluster.env, stdout=log, stderr=log)
        return self.process

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def begun(self) -> dict[int, dict[str, Any]]:
        """The values of every trial that shared storage knows of."""
        with self.cluster.store(f"s3://{BUCKET}/runs/{NAME}") as store:
            lines = store.read("trials.jsonl").splitlines() if store.exists("trials.jsonl") else []
        entries = [json.loads(line) for line in lines]
        return {entry["trial"]: entry["params"] for entry in entries if entry["event"] == "started"}

    def saved(self) -> list[int]:
        """The trials that have a checkpoint."""
        found = []
        for number in range(TRIALS):
            with self.cluster.store(f"s3://{BUCKET}/runs/{NAME}-{number:04d}/checkpoints") as store:
                found += [number] if any(key.endswith("manifest.json") for key in store.list()) else []
        return found

    def wait_for(self, what: Any, seconds: float = 600) -> None:
        def there() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the study ended with {self.process.returncode}:\n{self.said()[-3000:]}")
            return bool(what())

        wait_until(there, seconds, f"not in {seconds:g} s:\n{self.said()[-3000:]}", 0.2)


def test_a_study_loses_a_worker_node_and_then_its_cluster(cluster: Cluster, tmp_path: Path):
    study = SubmittedStudy(cluster)
    study.start()
    study.wait_for(lambda: len(study.begun()) == TRIALS and study.saved())
    lost = next(node for node in WORKERS if cluster.processes(node, "ray::LatentShard"))
    cluster.kill(lost)
    already = len(study.saved())
    study.wait_for(lambda: len(study.saved()) >= min(2, already + 1))
    before = study.begun()

    for node in (HEAD, *WORKERS):
        cluster.kill(node)
    study.process.wait(60)
    shutil.rmtree(cluster.desk / "glann-jobs")
    cluster.repair()
    status = study.start().wait(900)
    said = study.said()
    assert status == 0, said[-3000:]
    assert f"resuming with the copy of the study folder beside s3://{BUCKET}/runs/{NAME}/checkpoints" in said
    assert study.begun() == before, "a trial started anew, or with other values"

    folder = cluster.desk / "glann-jobs" / "studies" / NAME
    ended = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert {entry["trial"] for entry in ended if entry.get("state") == "finished"} == set(range(TRIALS))
    logs = [path.read_text() for path in (folder / "logs").iterdir()]
    assert any("resuming from the checkpoint at stage" in log for log in logs)
    last = said[said.rindex("look at") :]
    assert f"s3://{BUCKET}/runs/{NAME}/report.html" in last
    assert str(cluster.net.home) not in last
    assert cluster.mlflow_url in last

    log = cluster.logs / "fetch.log"
    words = ("jobs", "fetch", NAME, "--runs", f"s3://{BUCKET}/runs")
    assert cluster.glann(*words, log=log).wait(120) == 0, log.read_text()
    home = cluster.desk / "studies" / NAME
    assert (home / "report.html").exists()
    assert len(list((home / "trials").glob("*/model/model.json"))) == 1, "of its best trial"
