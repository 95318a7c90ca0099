"""Which MLflow server a submitted job uses: found by itself, and told where runs would be lost with the head."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from glann.cluster.jobs import probe
from glann.cluster.jobs.tracking import VARIABLE, tracking_of
from glann.config.run import Config, load


def config(*overrides: str) -> Config:
    return load("digits", ["data.url=s3://faces/packed", "checkpoint.url=s3://faces/runs", *overrides])


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_the_clusters_own_server_is_used():
    found = tracking_of(config(), {}, "http://127.0.0.1:5000")
    assert found == ({}, "http://127.0.0.1:5000, the cluster's", "")


def test_this_machines_server_is_passed_where_the_cluster_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "https://me:planted@mlflow.example")
    found = tracking_of(config(), {}, "")
    assert found.variables == {VARIABLE: "https://me:planted@mlflow.example"}
    assert "planted" not in found.server
    assert tracking_of(config(), {}, "http://head:5000").variables == {}, "the cluster's goes first"
    assert tracking_of(config("tracking.uri=http://own:5000"), {}, "").server == "http://own:5000"
    assert tracking_of(config(), {VARIABLE: "http://passed:5000"}, "").server == "http://passed:5000"


@pytest.mark.parametrize("here", ["", "http://127.0.0.1:5000", "http://localhost:5000", "sqlite:///mlflow.db"])
def test_a_run_that_would_track_into_a_file_of_the_head_is_warned_of(here: str, monkeypatch: pytest.MonkeyPatch):
    """An address of this machine alone means another server on the head, or none."""
    monkeypatch.setenv(VARIABLE, here)
    found = tracking_of(config(), {}, "")
    assert (found.variables, found.server) == ({}, "")
    assert "runs go to a file on the head, lost with it; start one by `glann mlflow STORE`" in found.warning


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "sqlite:////home/ray/mlflow.db"])
def test_a_file_that_is_named_is_warned_of_too(uri: str):
    assert f"runs go to {uri}, a file on the head" in tracking_of(config(f"tracking.uri={uri}"), {}, "").warning
    assert tracking_of(config("tracking.enabled=false"), {}, "") == ({}, "", "")
    assert not tracking_of(config("tracking.uri=postgresql://me:planted@db/mlflow"), {}, "").warning


def test_the_probe_tells_the_heads_server_without_its_password():
    """On the head: a stand-alone script of any Python."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(probe.__file__).parent)!r}); import probe; print(probe.tracking())"
    )
    env = {"MLFLOW_TRACKING_URI": "https://me:planted@mlflow.example:5000/x"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "https://***@mlflow.example:5000/x\n", done.stderr
