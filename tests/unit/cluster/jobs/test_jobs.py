"""Submitting a run: what travels, what is refused before anything starts, and what a job's end is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import glann
import pytest
import yaml
from glann.cli import main as cli
from glann.cli import run_status
from glann.cluster.jobs import client as jobs
from glann.cluster.jobs import probe, shipping, versions
from glann.config.run import Config, load
from glann.errors import EnvironmentFault, UserError
from job_server import Cluster
from packaging.specifiers import SpecifierSet
from ray.job_submission import JobStatus

ROOT = Path(glann.__file__).parent
SHARED = ("data.url=s3://faces/packed", "checkpoint.url=s3://faces/runs")


def config(*overrides: str) -> Config:
    return shipping.for_cluster(load("digits", [*SHARED, *overrides]))


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_a_folder_without_an_init_is_not_shipped(tmp_path: Path):
    for file in (
        "__init__.py",
        "models/__init__.py",
        "models/net.py",
        "models/x.pyc",
        "tests/unit/test_x.py",
        "a.yaml",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "__init__.py").touch()
    shipped = [file.as_posix() for file in shipping.package_files(tmp_path)]
    assert shipped == ["__init__.py", "models/__init__.py", "models/net.py"]


def test_the_job_runs_the_shipped_package_and_says_its_exit_status(tmp_path: Path):
    """The working folder on the head holds a folder that is called glann, as a home folder with a checkout does."""
    decoy = tmp_path / "home" / shipping.JOBS_FOLDER / "glann"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('the decoy was imported')")
    shipping.stage_package(tmp_path)
    run = shipping.stage_run(tmp_path, config())
    (run / shipping.CONFIG_FILE).write_text("name: [")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path), "PATH": path}
    result = subprocess.run(
        ["sh", "-c", shipping.entrypoint("trial")], cwd=run, env=env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2, result
    assert "is not valid YAML" in result.stderr
    assert result.stdout == "glann: exit status 2\n"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["checkpoint.url="], "checkpoint.url is empty, so the run could not be resumed on another cluster"),
        (["checkpoint.url=runs"], "checkpoint.url=runs is a path of this machine"),
        (
            ["data.url=data/digits"],
            "data.url=data/digits is a path of this machine; give s3://bucket/prefix, or the abs",
        ),
        (["data.url=~/digits"], "data.url=~/digits is a path of this machine"),
        (["data.source=pictures"], "data.source=pictures is a path of this machine; name an asset, or give s3://"),
        (["loss.weights=vgg.safetensors"], "loss.weights=vgg.safetensors is a path of this machine"),
    ],
)
def test_what_means_another_thing_on_the_cluster_is_refused(overrides: list[str], told: str):
    with pytest.raises(UserError, match=f"^{told}".replace("(", r"\(")):
        config(*overrides)


def test_a_job_joins_the_cluster_it_runs_on():
    """By name: without one, a cluster whose GPU nodes are not up yet would count as a machine without GPUs."""
    assert config("data.url=/mnt/faces", "cluster.address=10.0.0.1:6379").cluster.address == "auto"


def test_only_the_variables_that_are_named_go(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KEY", "planted")
    assert shipping.environment(["KEY"]) == {"KEY": "planted"}
    with pytest.raises(UserError, match="--env OTHER: not set here"):
        shipping.environment(["OTHER"])
    with pytest.raises(UserError, match="give the name alone") as caught:
        shipping.environment(["KEY=planted"])
    assert "planted" not in str(caught.value)


def test_keys_that_stay_behind_are_told_where_s3_is_used(monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "planted")
    assert "--env AWS_ACCESS_KEY_ID" in (shipping.forgotten_keys(config(), []) or "")
    assert "planted" not in (shipping.forgotten_keys(config(), []) or "")
    assert shipping.forgotten_keys(config(), ["AWS_ACCESS_KEY_ID"]) is None
    assert shipping.forgotten_keys(config("data.url=/a", "checkpoint.url=/b"), []) is None


def test_a_name_is_one_run_whose_attempts_are_counted(cluster: Cluster):
    first = jobs.start(cluster, config("name=faces"), {}, None)
    assert (first.id, first.attempt, first.active) == ("faces.1", 1, True)
    jobs.refuse_fork(first, config("name=faces"))
    with pytest.raises(UserError, match=r"faces.1 is running with another configuration; stop it first"):
        jobs.refuse_fork(first, config("name=faces", "glo.epochs=3"))
    cluster.ends("faces.1", JobStatus.STOPPED)
    second = jobs.start(cluster, config("name=faces"), {}, jobs.last_attempt(cluster, "faces"))
    assert second.id == "faces.2"
    assert jobs.find(cluster, "faces").id == "faces.2"
    assert jobs.find(cluster, "faces.1").id == "faces.1"
    with pytest.raises(UserError, match="no job dogs on this cluster; jobs: faces"):
        jobs.find(cluster, "dogs")


def test_two_submissions_in_the_same_moment_start_one_job(cluster: Cluster):
    """Both saw no job of that name; Ray takes an id only once."""
    jobs.start(cluster, config(), {}, None)
    with pytest.raises(UserError, match="another submission has just started digits"):
        jobs.start(cluster, config(), {}, None)


def test_a_job_brings_the_package_its_configuration_and_time_to_save(cluster: Cluster, monkeypatch):
    monkeypatch.setattr(shipping, "code_revision", lambda: "c0ffee")
    jobs.start(cluster, config("checkpoint.timeout_s=100", "glo.epochs=7"), {"KEY": "planted"}, None)
    job = cluster.jobs["digits.1"]
    assert set(cluster.shipped["digits.1"]) == {
        *(file.as_posix() for file in shipping.package_files()),
        "REVISION",
        "config.yaml",
        "start.sh",
    }
    assert job.runtime_env["env_vars"] == {"KEY": "planted", "RAY_JOB_STOP_WAIT_TIME_S": "160"}
    assert "planted" not in job.entrypoint + str(job.metadata)
    # read back from jobs that another version submitted, so these names stay
    known = {"glann.name", "glann.attempt", "glann.config", "glann.checkpoints", "glann.s3"}
    assert set(job.metadata) == known | {"job_name"}
    assert job.metadata["job_name"] == "digits", "its name in Ray"


def test_a_job_of_a_study_brings_the_study_and_no_other_takes_its_name_while_it_is_active(cluster: Cluster):
    study = "name: rates\nrecipe: digits\n"
    job = jobs.start(cluster, config("name=rates"), {}, None, study)
    assert job.id == "rates.1"
    assert {"study.yaml", "start.sh"} < set(cluster.shipped["rates.1"])
    assert "config.yaml" not in cluster.shipped["rates.1"]
    jobs.refuse_fork(job, config("name=rates"), study)
    for other in (study + "metric: l1\n", ""):
        with pytest.raises(UserError, match=r"rates.1 is running with another configuration; stop it first"):
            jobs.refuse_fork(job, config("name=rates"), other)


def test_a_listing_shows_names_of_variables_and_no_values(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    jobs.start(cluster, config(), {"KEY": "planted"}, None)
    cluster.jobs["other"] = SimpleNamespace(submission_id="other", metadata=None)
    monkeypatch.setattr(jobs, "connect", lambda address: cluster)
    monkeypatch.setattr(run_status, "look", lambda *_: run_status.Seen(why="not read here"))
    for command in (["list"], ["status", "digits"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["jobs", *command])
        assert not caught.value.code
    told = capsys.readouterr().out
    assert "digits\tdigits.1\trunning\t" in told
    assert "environment  KEY\n" in told
    assert "planted" not in told
    assert "other" not in told


@pytest.mark.parametrize(
    ("status", "code", "log", "expected", "words"),
    [
        (JobStatus.SUCCEEDED, 0, "", 0, "finished"),
        (JobStatus.FAILED, 2, "", 2, "failed with exit status 2"),
        (JobStatus.FAILED, 75, "", 75, "stopped and saved"),
        (JobStatus.FAILED, -9, "", 137, "failed with exit status 137"),
        (JobStatus.FAILED, None, "", 1, "failed with exit status 1"),
        (JobStatus.STOPPED, None, "saving\nglann: exit status 75\n", 75, "stopped and saved"),
        (JobStatus.STOPPED, None, "glann: exit status 0\n", 0, "finished before it could be stopped"),
        (JobStatus.STOPPED, None, "glann: exit status 143\n", 143, "stopped before training started"),
        (JobStatus.STOPPED, None, "saving\n", 1, "killed before it had saved"),
    ],
)
def test_the_end_of_a_job_is_the_end_of_its_training(
    cluster: Cluster, status: JobStatus, code: int | None, log: str, expected: int, words: str
):
    jobs.start(cluster, config(), {}, None)
    cluster.ends("digits.1", status, code, log)
    job = jobs.find(cluster, "digits")
    assert jobs.exit_status(cluster, job) == expected
    assert jobs.outcome(job, expected).startswith(words)


def test_a_log_is_copied_once_though_the_connection_drops(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    job = jobs.start(cluster, config(), {}, None)
    attempts = iter([["one\n", "tw"], ["one\ntwo\n"], ["one\n", "two\nthr", "ee\n"]])

    async def tail(job_id: str):
        chunks = next(attempts)
        for chunk in chunks:
            yield chunk
        if chunks[-1].startswith("tw"):
            raise RuntimeError("WebSocket connection closed unexpectedly")
        if chunks[-1] == "ee\n":
            cluster.ends("digits.1", JobStatus.SUCCEEDED, 0)

    cluster.tail_job_logs = tail
    copied: list[str] = []
    jobs.follow(cluster, job, copied.append)
    assert "".join(copied) == "one\ntwo\nthree\n"


def test_a_cluster_that_is_gone_is_told_in_one_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    job = jobs.start(cluster, config(), {}, None)

    async def tail(job_id: str):
        raise OSError("connection refused")
        yield ""

    cluster.tail_job_logs = tail
    with pytest.raises(EnvironmentFault, match=r"lost the cluster while following digits.1; once it is back"):
        jobs.follow(cluster, job, lambda text: None)


def test_versions_that_do_not_fit_are_named_with_what_is_needed_and_what_is_here():
    allowed = {"python": SpecifierSet(">=3.11"), "torch": SpecifierSet(">=2.6"), "ray": SpecifierSet(">=2.60,<2.61")}
    here = probe.versions(["torch", "ray"])
    good = {"python": "3.12.1", "torch": "2.13.0+cu126", "ray": "2.60.0"}
    assert versions.misfits({"a": good}, allowed) == []
    faults = versions.misfits({"a": good | {"torch": "2.4.0"}, "b": good | {"torch": "2.4.0", "ray": None}}, allowed)
    assert faults == [
        f"torch 2.4.0 (needed: >=2.6; here: {here['torch']}) on a, b",
        f"no ray (needed: <2.61,>=2.60; here: {here['ray']}) on b",
    ]
    assert versions.misfits({"a": good | {"python": "3.10.2"}}, allowed)[0].startswith("python 3.10.2 (needed: >=3.11;")


def test_another_ray_is_refused_before_a_probe_is_sent(cluster: Cluster):
    cluster._server_ray_version = "2.40.0"
    with pytest.raises(
        UserError, match=r"^http://h:1 does not fit glann .*ray 2.40.0 \(needed: .*here: 2.60"
    ) as caught:
        versions.refuse_misfit(cluster, "http://h:1")
    assert "pip install -c constraints.txt" in str(caught.value)
    assert cluster.jobs == {}


def test_the_probe_removes_those_before_it_and_says_why_it_failed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    def answer(log: str):
        def submit_job(**given):
            job = Cluster.submit_job(cluster, **given)
            cluster.ends(job, JobStatus.SUCCEEDED, 0, log)
            return job

        monkeypatch.setattr(cluster, "submit_job", submit_job)

    jobs.start(cluster, config(), {}, None)
    answer('Runtime env is setting up.\nVERSIONS {"10.0.0.1": {"torch": "2.13.0"}}\nTRACKING http://mlflow:5000\n')
    assert versions.run_probe(cluster, ["torch"]) == ({"10.0.0.1": {"torch": "2.13.0"}}, "http://mlflow:5000")
    answer("sh: 1: exec: python3: not found\n")
    with pytest.raises(EnvironmentFault, match="python3: not found; `ray start` there needs the python3"):
        versions.run_probe(cluster, ["torch"])
    assert [job.startswith("glann-probe-") for job in cluster.jobs] == [False, True], "the job, and the last probe"


def test_an_address_must_be_the_dashboards():
    with pytest.raises(UserError, match="give the dashboard's, such as http://HEAD:8265"):
        jobs.connect("ray://10.0.0.1:10001")
    with pytest.raises(EnvironmentFault, match=r"no Ray dashboard answers at http://127.0.0.1:1"):
        jobs.connect("127.0.0.1:1")


@pytest.mark.parametrize(
    "address", ["http://[::1", "http://", "http://head:port", "http:/head:8265", "head:99999", "x" * 64, "x." * 130]
)
def test_an_address_that_cannot_be_is_one_line(address: str):
    with pytest.raises(UserError, match="give the dashboard's"):
        jobs.connect(address)


def test_a_dead_proxy_before_the_dashboard_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match=r"no Ray dashboard answers at http://10.0.0.1:8265") as caught:
        jobs.connect("http://10.0.0.1:8265")
    assert "the proxy http://***@127.0.0.1:9 of the variable HTTP_PROXY" in str(caught.value)
    assert "export NO_PROXY=10.0.0.1" in str(caught.value)


@pytest.mark.parametrize(
    "command", [["submit"], ["jobs"], ["jobs", "list"], ["jobs", "status"], ["jobs", "watch"], ["jobs", "logs"]]
)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "Usage: glann" in out
    if command != ["jobs"]:
        assert f" glann {' '.join(command)}" in out.split("\n", 3)[3], "there is no example"


def test_the_staged_configuration_is_the_one_that_was_asked_for(tmp_path: Path):
    asked = config("glo.epochs=7", "name=mine")
    staged = yaml.safe_load((shipping.stage_run(tmp_path, asked) / shipping.CONFIG_FILE).read_text())
    assert Config.model_validate(staged) == asked
