"""`glann submit` and `glann jobs` against a real head with tokens: what a user of a cluster does in a week."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
from glann.cluster.jobs.revision import code_revision
from ray_head import Head, ray_head

SECRET = "planted-8f1d0c"
STOPPED_AND_SAVED, INTERRUPTED = 75, 130
# each submission starts Ray workers, which takes long on a busy machine
pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def head():
    with ray_head() as started:
        yield started


@pytest.fixture
def cluster(glann, head: Head, monkeypatch: pytest.MonkeyPatch):
    """`glann` on a machine that has the cluster's token and its address."""
    changed = head.env | {"RAY_API_SERVER_ADDRESS": head.address, "PLANTED": SECRET}
    monkeypatch.setattr(glann, "env", glann.env | changed)
    return glann


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every node of the cluster has."""
    return tmp_path_factory.mktemp("shared")


def wait_until(what, process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            out, err = process.communicate()
            pytest.fail(f"ended with {process.returncode} before that:\n{out}\n{err}")
        time.sleep(0.2)


def words(glann, shared: Path, name: str) -> list[str]:
    """A run of a recipe of one's own, which lies outside the package."""
    recipe = glann.folder / "mine.yaml"
    shutil.copyfile(Path(__file__).parents[2] / "configs" / "digits.yaml", recipe)
    places = [f"data.url={shared / 'digits'}", f"checkpoint.url={shared / 'runs'}"]
    best = ["evaluation.every_epochs=20", "evaluation.interim_samples=50", "checkpoint.use=best"]
    return ["submit", "mine.yaml", *glann.small, "glo.epochs=40", *best, *places, "--name", name, "--env", "PLANTED"]


def metadata_of(head: Head, job: str) -> dict[str, str]:
    """What Ray's dashboard shows as the metadata of a job."""
    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{head.address}/api/jobs/{job}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["metadata"]


def test_a_run_is_stopped_and_gone_on_with_under_one_name(cluster, shared: Path, head: Head):
    submit = words(cluster, shared, "trial")
    watching = cluster.start(*submit, "--wait")
    checkpoints = shared / "runs" / "trial" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("step-*/manifest.json")), watching)
    wait_until(lambda: "checkpoint " in cluster("jobs", "status", "trial").stdout, watching)
    shown = cluster("jobs", "status", "trial").stdout
    assert "progress     stage 1 (GLO)  epoch" in shown
    assert "mlflow       sqlite:///mlflow.db" in shown
    assert "\t".join(("trial", "trial.1", "running")) in cluster("jobs", "list").stdout
    assert "stage 1 (GLO)  epoch" in cluster("jobs", "list", "--runs", str(shared / "runs")).stdout
    metadata = metadata_of(head, "trial.1")
    assert metadata["job_name"] == "trial"
    assert metadata["glann.progress"].startswith("stage 1 (GLO)  epoch"), "in Ray's dashboard"
    bar = cluster.start("jobs", "watch", "trial")

    stopped = cluster("jobs", "stop", "trial")
    assert stopped.returncode == 0, stopped.stderr
    assert "trial.1: stopped and saved" in stopped.stdout
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == STOPPED_AND_SAVED, err
    assert bar.wait(60) == STOPPED_AND_SAVED
    assert cluster("jobs", "watch", "trial", "--runs", str(shared / "runs")).returncode == STOPPED_AND_SAVED
    assert "submitted trial.1" in out
    assert "the run was stopped and is saved" in out
    assert "stopped and saved; the same `glann submit` resumes it" in cluster("jobs", "status", "trial").stdout

    finished = cluster(*submit, "--wait", timeout=900)  # 34 epochs, on a machine that may be busy
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "submitted trial.2, which resumes trial.1 (stopped)" in finished.stdout
    assert "resuming from the checkpoint at stage 1 (GLO)" in finished.stdout
    assert "trial.2: finished" in finished.stderr
    assert (head.home / "glann-jobs" / "runs" / "trial" / "report.html").exists()
    assert " in 2 starts" in finished.stdout, "the time of the whole run"
    summary = json.loads((shared / "runs" / "trial" / "summary.json").read_text())
    assert summary["timings"]["starts"] == 2
    best = json.loads((checkpoints / "best.json").read_text())
    assert (summary["use"], summary["checkpoint"]) == ("best", best["step"]), "the best checkpoint is packaged"
    assert (
        f"best         {best['metric']} {best['value']:.4g} at step {best['step']}"
        in cluster("jobs", "status", "trial").stdout
    )
    assert summary["made"]["commit"] == (code_revision() or ""), "that of the package here"

    assert "progress     finished" in cluster("jobs", "status", "trial").stdout
    copy = shared / "runs" / "trial"
    assert f"{copy}/report.html" in finished.stdout, "an address that other machines have"
    assert "  runs/trial" not in finished.stdout, "a path on the head"
    again = cluster(*submit)
    assert again.stdout.startswith("trial has finished; nothing was started"), again.stdout + again.stderr
    assert cluster("jobs", "fetch", "trial").returncode == 0
    assert (cluster.folder / "runs" / "trial" / "report.html").read_bytes() == (copy / "report.html").read_bytes()

    listed = cluster("jobs", "list").stdout
    rows = [line.split("\t")[:3] for line in listed.splitlines()]
    assert ["trial", "trial.2", "succeeded"] in rows
    assert ["trial", "trial.1", "stopped"] in rows
    assert "glann-probe" not in listed
    told = [listed, cluster("jobs", "status", "trial").stdout, cluster("jobs", "logs", "trial.1").stdout, out, err]
    assert "PLANTED" in told[1], "which variables went is told"
    assert SECRET not in "".join([*told, finished.stdout, finished.stderr])


def test_a_job_that_fails_ends_with_the_status_of_its_training(cluster, shared: Path):
    """Nothing is packed there and nothing is to be: the driver on the head refuses, with status 2."""
    result = cluster(*words(cluster, shared, "hopeless"), f"data.url={shared}/nowhere", "data.source=", "--wait")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "nowhere" in result.stdout
    assert "hopeless.1: failed with exit status 2" in result.stderr
    assert "failed, exit status 2" in cluster("jobs", "list").stdout


def test_ctrl_c_leaves_the_job_running_and_the_same_command_finds_it(cluster, shared: Path):
    submit = [*words(cluster, shared, "watched"), "glo.epochs=5000"]
    watching = cluster.start(*submit, "--wait")
    wait_until(lambda: "watched.1\trunning" in cluster("jobs", "list").stdout, watching)
    time.sleep(5)  # it asks for the log
    watching.send_signal(signal.SIGINT)
    err = watching.communicate(timeout=60)[1]
    assert watching.returncode == INTERRUPTED
    assert "watched.1 is still running" in err
    assert "state        running" in cluster("jobs", "status", "watched").stdout
    again = cluster(*submit)
    first_line = again.stdout.splitlines()[0]
    assert (again.returncode, first_line) == (0, "watched.1 is running already; nothing was started")
    other = cluster(*submit, "checkpoint.every_minutes=9")  # which may change, but not while it runs
    assert other.returncode == 2
    assert "watched.1 is running with another configuration; stop it first" in other.stderr
    cluster("jobs", "stop", "watched")
    assert "state        running" not in cluster("jobs", "status", "watched.1").stdout
    assert "watched.2" not in cluster("jobs", "list").stdout


def test_a_cluster_that_lacks_what_is_needed_is_refused(cluster, shared: Path, tmp_path: Path):
    """The package here says that it needs a DeepSpeed from the future."""
    info = tmp_path / "glann-0.1.0.dist-info"
    info.mkdir()
    says = ("Metadata-Version: 2.1", "Name: glann", "Version: 0.1.0", "Requires-Python: >=3.11")
    needs = ("Requires-Dist: ray>=2.60", "Requires-Dist: deepspeed>=99", "")
    (info / "METADATA").write_text("\n".join([*says, *needs]))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = cluster(*words(cluster, shared, "early"), PYTHONPATH=path)
    assert result.returncode == 2
    here = metadata.version("deepspeed")
    assert f"deepspeed {here} (needed: >=99; here: {here})" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "early" not in cluster("jobs", "list").stdout


def test_without_its_token_nothing_is_told(cluster, head: Head):
    refused = cluster("jobs", "list", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="not-it")
    assert refused.returncode == 2
    assert "the one that was sent is wrong; copy the head's ~/.ray/auth_token here" in refused.stderr
    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in refused.stderr
