"""A study from the command line, on a cluster of two cores whose trials take both: it survives its own death and its
trials' failures, counts its trials exactly, and leaves nothing behind on the cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from glann.cluster.nodes.ray_private import COORDINATOR_ACTOR
from mlflow import MlflowClient
from ray_head import ray_head

NAME, TRIALS = "mini", 5
STATES = {0: "finished", 1: "finished", 2: "stopped", 3: "failed", 4: "failed"}
STUDY = {
    "name": NAME,
    "recipe": "digits",
    "overrides": {
        "cluster.workers": 2,
        "data.max_rows": 300,
        "generator.width": 8,
        "generator.latent_dim": 8,
        "loss.kind": "l1",
        "glo.epochs": 9,
        "glo.batch_size": 40,
        "sampler.kind": "imle",
        "sampler.epochs": 3,
        "sampler.noise_dim": 8,
        "checkpoint.every_epochs": 1,
        "preview.every_epochs": 100,
        "evaluation.samples": 50,
    },
    # A generator that learns at 1e30 is not finite, so two of the four combinations fail; codes that do not move are
    # worse than those that do, so one is stopped early.
    "space": {"glo.latent_lr": {"choice": [0.03, 1e-9]}, "glo.generator_lr": {"choice": [0.003, 1e30]}},
    "metric": "fd_squeezenet",
    "search": {"kind": "grid"},
    "scheduler": {"kind": "asha", "grace": 2, "reduction": 2},
    "budget": {"trials": TRIALS},
}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def head():
    with ray_head(cpus=2) as started, ray_head(cpus=1):  # and another user's Ray on the same machine
        yield started


class Study:
    """A study folder and what it says."""

    def __init__(self, glann, name):
        self.glann, self.folder = glann, glann.folder / "studies" / name

    def lines(self):
        path = self.folder / "trials.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def ended(self):
        return {line["trial"]: line for line in self.lines() if line["event"] == "ended"}

    def epochs(self, number):
        path = self.run_dir(number) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return [entry["epoch"] for entry in entries if entry.get("stage") == "glo"]

    def run_dir(self, number):
        return self.folder / "trials" / f"{self.folder.name}-{number:04d}"

    def wait_until(self, what, process, seconds=400):
        deadline = time.monotonic() + seconds
        while not what():
            if process.poll() is not None or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                pytest.fail(f"ended with {process.returncode} before that:\n{out}\n{err}")
            time.sleep(0.1)


@pytest.fixture(scope="module")
def disturbed(glann, head):
    """The study, whose command was interrupted (Ctrl-C) and then killed (SIGKILL) within the second trial."""
    (glann.folder / "mini.yaml").write_text(yaml.safe_dump(STUDY))  # its keys in the order of the alphabet
    env = head.env | {"RAY_ADDRESS": head.cluster}
    study = Study(glann, NAME)
    process = glann.start("tune", "mini.yaml", **env)
    study.wait_until(lambda: len(study.epochs(0)) >= 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75, out + err
    assert "is saved; the same command resumes it" in err
    assert study.ended() == {}
    process = glann.start("tune", "mini.yaml", **env)
    study.wait_until(lambda: 0 in study.ended() and len(study.epochs(1)) >= 2, process)
    before = (study.run_dir(0) / "metrics.jsonl").read_bytes()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = glann("tune", "mini.yaml", "--resume", timeout=700, **env)
    assert again.returncode == 0, again.stdout + again.stderr
    return study, before, again


def test_no_trial_is_lost_and_none_is_run_again(disturbed):
    study, before, _ = disturbed
    started = [line["trial"] for line in study.lines() if line["event"] == "started"]
    ended = [line["trial"] for line in study.lines() if line["event"] == "ended"]
    assert started == list(range(TRIALS))
    assert sorted(ended) == list(range(TRIALS))
    assert (study.run_dir(0) / "metrics.jsonl").read_bytes() == before
    assert study.epochs(1)[:2] == [1, 2]
    assert study.epochs(1)[-1] == 9
    log = (study.folder / "logs" / f"{NAME}-0001.log").read_text()
    assert "resuming from the checkpoint" in log or study.epochs(1) == list(range(1, 10))


def test_a_configuration_that_always_fails_does_not_end_the_study(disturbed):
    study, _, again = disturbed
    assert {number: line["state"] for number, line in study.ended().items()} == STATES
    for number, line in study.ended().items():
        assert ("not finite" in line["why"]) == (STATES[number] == "failed")
        assert (line["value"] is not None) == (STATES[number] == "finished")
    assert "not finite" in again.stdout
    assert "Traceback" not in again.stdout + again.stderr


def test_a_trial_that_does_badly_is_stopped_early_and_keeps_no_checkpoint(disturbed):
    study = disturbed[0]
    stopped, finished = study.run_dir(2), study.run_dir(1)
    assert study.ended()[2]["epoch"] < 9
    assert not [path for path in (stopped / "checkpoints").rglob("*") if path.is_file()]
    assert not (stopped / "summary.json").exists(), "its sampler was evaluated"
    assert list((finished / "checkpoints").rglob("manifest.json"))


def test_it_leaves_nothing_on_the_cluster(disturbed, head):
    deadline = time.monotonic() + 60
    while (left := what_is_left(head)) != NOTHING and time.monotonic() < deadline:
        time.sleep(1)
    assert left == NOTHING


NOTHING = {"actors": [], "groups": [], "cpus": 2.0}  # besides the actor that Ray Train leaves
LOOK = """
import json, logging, sys
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
actors = [actor.class_name for actor in list_actors(address=sys.argv[2], filters=[("state", "=", "ALIVE")])]
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
print(json.dumps({"actors": actors, "groups": groups, "cpus": ray.available_resources().get("CPU")}))
"""


def what_is_left(head):
    """Living actors, placement groups and free cores; asked by a process of its own, as Ray reads its token once."""
    command = [sys.executable, "-c", LOOK, head.cluster, head.address]
    done = subprocess.run(command, env=os.environ | head.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout.splitlines()[-1])
    return left | {"actors": [name for name in left["actors"] if name != COORDINATOR_ACTOR]}


def test_its_runs_are_nested_in_mlflow(disturbed, glann):
    client = MlflowClient(f"sqlite:///{glann.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("glann").experiment_id
    [parent] = client.search_runs([experiment], f"tags.`mlflow.runName` = '{NAME}'")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(int(run.data.tags["glann.trial"]) for run in children) == list(range(TRIALS))
    finished = {int(run.data.tags["glann.trial"]) for run in children if run.info.status == "FINISHED"}
    study = disturbed[0]
    assert finished == {number for number, line in study.ended().items() if line["state"] == "finished"}
    for run in children:
        if run.info.status == "FINISHED":
            number = int(run.data.tags["glann.trial"])
            assert run.data.metrics["evaluation/fd_squeezenet"] == pytest.approx(study.ended()[number]["value"])
    assert parent.data.metrics["study/best_fd_squeezenet"] == min(
        line["value"] for line in study.ended().values() if line["value"] is not None
    )
    assert {"report.html", "study.yaml", "leaderboard.csv"} <= {
        artifact.path for artifact in client.list_artifacts(parent.info.run_id)
    }


def test_the_same_command_again_says_so_and_another_study_is_refused(disturbed, glann, head):
    env = head.env | {"RAY_ADDRESS": head.cluster}
    again = glann("tune", "mini.yaml", **env)
    assert again.returncode == 0
    assert "all 5 trials have ended" in again.stdout
    (glann.folder / "other.yaml").write_text(yaml.safe_dump(STUDY | {"metric": "l1"}))
    refused = glann("tune", "other.yaml", **env)
    assert refused.returncode == 2
    assert "holds another study: metric is 'fd_squeezenet' there and 'l1' here" in refused.stderr


def test_second_stages_share_a_trained_first_one(disturbed, glann, head):
    """Six trials of stage 2 on the base recipe's stage 1, whose generator is in each of their models."""
    first = disturbed[0].run_dir(0)
    study = {
        "name": "second",
        "stage_one": str(first),
        "space": {"sampler.lr": {"log_uniform": [1e-4, 1e-2]}, "sampler.noise_dim": {"integer": [2, 12]}},
        "metric": "fd_squeezenet",
        "budget": {"trials": 4},
    }
    (glann.folder / "second.yaml").write_text(yaml.safe_dump(study))
    done = glann("tune", "second.yaml", **head.env | {"RAY_ADDRESS": head.cluster})
    assert done.returncode == 0, done.stdout + done.stderr
    second = Study(glann, "second")
    assert {line["state"] for line in second.ended().values()} == {"finished"}
    assert len(second.ended()) == 4
    generator = (first / "model" / "generator.safetensors").read_bytes()
    for number in range(1, 4):
        assert (second.run_dir(number) / "model" / "generator.safetensors").read_bytes() == generator
        assert not (second.run_dir(number) / "checkpoints").exists(), "stage 1 was trained again"
    drawn = glann("sample", str(second.run_dir(2)), "--n", "4", "--out", "second.npz")
    assert drawn.returncode == 0, drawn.stderr
