"""`glann jobs` shows how runs stand by what lies beside their checkpoints, with a cluster and without one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from glann.cli import main as cli
from glann.cli import watch
from glann.cluster.jobs import client as jobs
from glann.cluster.jobs import shipping
from glann.config.run import load
from glann.errors import EnvironmentFault
from glann.reports.status import DeviceUse, Measured, Status, write_status
from glann.storage.local import LocalStore
from job_server import Cluster
from ray.job_submission import JobStatus

MLFLOW = "http://mlflow:5000/#/experiments/1/runs/ab?workflowType=machine_learning"
GIB = 1 << 30


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    server = Cluster()
    monkeypatch.setattr(jobs, "connect", lambda address: server)
    monkeypatch.setattr(shipping, "stage_package", lambda folder: folder)  # nothing runs it
    return server


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def submit(cluster: Cluster, runs: Path, name: str = "faces") -> None:
    config = shipping.for_cluster(load("digits", [f"name={name}", "data.url=/x", f"checkpoint.url={runs}"]))
    jobs.start(cluster, config, {}, jobs.last_attempt(cluster, name))  # type: ignore[arg-type]


def write(runs: Path, name: str = "faces", **changes: object) -> None:
    now = time.time()
    status = Status(
        name=name,
        state="running",
        host="head-1",
        began=now - 600,
        updated=now,
        stage="stage 1 (GLO)",
        epoch=6,
        epochs=60,
        done=0.1,
        loss=0.25,
        left_s=700.0,
        checkpoint_step=7,
        checkpoint_at=now - 240,
        devices=(DeviceUse(rank=0, node="w-1", device="H100", gpu=True, use=0.9, memory=61 * GIB, total=80 * GIB),),
        mlflow=MLFLOW,
    )
    write_status(LocalStore(runs / name), status.model_copy(update=changes))


def glann(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["jobs", *words])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("without_cluster", [False, True])
def test_a_status_shows_all_that_is_known(cluster: Cluster, runs: Path, without_cluster: bool, capsys):
    submit(cluster, runs)
    best = Measured(metric="fd_lite0", value=12.345, step=300)
    write(runs, best=best, measured=Measured(metric="fd_lite0", value=13.0, step=400))
    words = ["--runs", str(runs)] if without_cluster else []
    if without_cluster:
        cluster.jobs.clear()
    assert glann("status", "faces", *words) == 0
    shown = capsys.readouterr().out
    for line in (
        "progress     stage 1 (GLO)  epoch 6/60  12 min left  loss 0.2500",
        "saved        checkpoint 4 min ago, step 7",
        "devices      1 GPU 90%, 61.0 of 80.0 GiB",
        "  worker 0   H100 on w-1, 90%, 61.0 of 80.0 GiB",
        "measured     fd_lite0 13 at step 400",
        "best         fd_lite0 12.35 at step 300",
        f"mlflow       {MLFLOW}",
        "ago by head-1",
    ):
        assert line in shown, shown
    assert ("attempt      faces.1" in shown) != without_cluster


def test_a_status_that_nobody_writes_any_more_is_called_that(cluster: Cluster, runs: Path, capsys):
    submit(cluster, runs)
    write(runs, updated=time.time() - 3600, checkpoint_at=None)
    glann("status", "faces")
    shown = capsys.readouterr().out
    assert "progress     no sign of life for 60 min: the driver on head-1 has died, or cannot write there" in shown
    assert "last seen    stage 1 (GLO)  epoch 6/60" in shown
    glann("list")
    assert "no sign of life for 60 min" in capsys.readouterr().out


def test_a_status_of_the_attempt_before_is_not_taken_for_this_one(cluster: Cluster, runs: Path, capsys):
    submit(cluster, runs)
    write(runs, state="stopped", message="the run was stopped and is saved")
    cluster.ends("faces.1", JobStatus.STOPPED)
    submit(cluster, runs)
    cluster.jobs["faces.2"].start_time = 1000 * (time.time() + 60)
    glann("status", "faces")
    assert "progress     earlier attempt: stopped: the run was stopped and is saved" in capsys.readouterr().out


def test_a_folder_of_the_cluster_that_is_not_here_is_named(cluster: Cluster, tmp_path: Path, capsys):
    submit(cluster, tmp_path / "mnt" / "shared")
    assert glann("status", "faces") == 0
    assert f"progress     unknown: {tmp_path}/mnt/shared is not on this machine" in capsys.readouterr().out


def test_a_listing_shows_the_progress_of_each_run_once(cluster: Cluster, runs: Path, capsys):
    submit(cluster, runs)
    cluster.ends("faces.1", JobStatus.STOPPED)
    submit(cluster, runs)
    submit(cluster, runs, "dogs")
    write(runs)
    glann("list")
    lines = {line.split("\t")[1]: line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["faces.2"][6:] == ["stage 1 (GLO)  epoch 6/60  12 min left  loss 0.2500", MLFLOW]
    assert lines["faces.1"][6:] == ["", ""]
    assert lines["dogs.1"][6:] == ["not begun yet", ""]


def test_runs_are_listed_without_a_cluster(runs: Path, capsys):
    write(runs, "faces")
    write(runs, "dogs", updated=1.0, state="finished", mlflow=None)
    write(runs / "study" / "trials", "study-0001")
    assert glann("list", "--runs", str(runs)) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[1:]] == [["faces", "running"], ["dogs", "finished"]]
    assert lines[2][3:] == ["finished", ""]


def test_a_cluster_that_is_gone_names_the_way_without_it(monkeypatch: pytest.MonkeyPatch, capsys):
    def gone(address: str) -> None:
        raise EnvironmentFault("no Ray dashboard answers at http://head:8265")

    monkeypatch.setattr(jobs, "connect", gone)
    for command in (["list"], ["status", "faces"], ["watch", "faces"]):
        assert glann(*command) == 1
        assert "`--runs` and the checkpoint.url of the runs show how they stand without the cluster" in (
            capsys.readouterr().err
        )


def test_a_run_that_is_not_there_is_a_user_error(runs: Path, capsys):
    for command in ("status", "watch"):
        assert glann(command, "faces", "--runs", str(runs)) == 2
        assert f"`glann jobs list --runs {runs}` lists its runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code", "log", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, "", 0),
        (JobStatus.FAILED, 2, "", 2),
        (JobStatus.STOPPED, None, "glann: exit status 75\n", 75),
    ],
)
def test_watching_ends_with_the_job_and_its_status(
    cluster: Cluster, runs: Path, status: JobStatus, code: int | None, log: str, expected: int, monkeypatch, capsys
):
    submit(cluster, runs)
    write(runs)
    polls = 0

    def sleep(seconds: float) -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            cluster.ends("faces.1", status, code, log)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert glann("watch", "faces") == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stage 1 (GLO)  epoch 6/60  12 min left  loss 0.2500"
    assert len(lines) == 2, "a line a minute in a log file"
    assert lines[1].startswith("faces.1: ")


def test_watching_without_a_cluster_ends_with_the_run(runs: Path, monkeypatch, capsys):
    write(runs)
    monkeypatch.setattr(
        watch.time, "sleep", lambda s: write(runs, state="stopped", message="stopped and saved", exit_status=75)
    )
    assert glann("watch", "faces", "--runs", str(runs)) == 75
    assert capsys.readouterr().out.splitlines()[-1] == "faces: stopped: stopped and saved"


def test_watching_without_a_cluster_ends_when_nobody_writes_any_more(runs: Path, capsys):
    write(runs, updated=time.time() - 3600)
    assert glann("watch", "faces", "--runs", str(runs)) == 1
    assert "faces: no sign of life for 60 min" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_alone(cluster: Cluster, runs: Path, monkeypatch, capsys):
    submit(cluster, runs)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert glann("watch", "faces") == 130
    assert "faces is not affected; watch again: glann jobs watch faces" in capsys.readouterr().err
    assert jobs.find(cluster, "faces").active  # type: ignore[arg-type]
