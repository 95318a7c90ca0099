"""A local Ray that cannot start is refused beforehand with a remedy that helps, and what it inherits is set in time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from glann.cluster.doctor.checks import ray_cluster as ray_check
from glann.cluster.nodes.ray import hide_working_folder, no_ray, ray_cluster, require_ray
from glann.config.run import load
from glann.errors import EnvironmentFault, UserError

LONG = "/scratch/projects/face-generation/firstname.lastname/slurm_job.12345678.node0042.cluster/tmp"


@pytest.fixture(autouse=True)
def default_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.clear()  # `require_ray` sets variables for Ray
    os.environ.update(before)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_a_socket_is_refused_with_a_remedy_that_helps(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, LONG)
    with (
        pytest.raises(
            EnvironmentFault, match=rf"{name}={LONG}: \d+ characters too many; `export RAY_TMPDIR=/tmp`"
        ) as caught,
        ray_cluster(load("digits")),
    ):
        pytest.fail("started")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    require_ray(load("digits"))


def test_the_limit_is_that_of_rays_sockets(monkeypatch: pytest.MonkeyPatch):
    """One character less than the shortest folder that is refused is accepted."""
    for length in range(20, 60):
        monkeypatch.setenv("TMPDIR", "/" + "a" * length)
        socket = f"/{'a' * length}/ray/session_2026-11-28_12-00-00_123456_{os.getpid()}/sockets/plasma_store"
        if len(socket) <= 107:
            require_ray(load("digits"))
        else:
            with pytest.raises(EnvironmentFault, match=f": {len(socket) - 107} characters too many"):
                require_ray(load("digits"))


def test_a_relative_folder_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", "")
    with pytest.raises(EnvironmentFault, match="RAY_TMPDIR=: that is no absolute path"):
        require_ray(load("digits"))


def test_a_ray_that_did_not_start_does_not_send_the_user_in_a_circle():
    said = str(no_ray(None, Exception("the raylet failed")))
    assert "the raylet failed" in said
    assert "same command" not in said
    assert "/tmp/ray/session_latest/logs" in said


@pytest.mark.parametrize(
    ("given", "kept"), [("", ""), (":", ""), (":/a", "/a"), ("/a::/b:", "/a:/b"), (".:/a", ".:/a"), ("/a", "/a")]
)
def test_an_empty_entry_of_the_path_is_not_passed_on(given: str, kept: str, monkeypatch: pytest.MonkeyPatch):
    """`export PYTHONPATH=$PYTHONPATH:/more` leaves one, which is the working folder; one that is named is meant."""
    monkeypatch.setenv("PYTHONPATH", given)
    hide_working_folder()
    assert os.environ["PYTHONPATH"] == kept


def test_ray_reads_the_token_that_is_made_for_it(tmp_path: Path):
    """In a process of its own: Ray reads its settings once, when it is imported, so they must be set before."""
    code = (
        "from glann.cluster.nodes.ray import require_ray; from glann.config.run import load;"
        "require_ray(load('digits'));"
        "from ray._raylet import AuthenticationMode as Mode, AuthenticationTokenLoader, get_authentication_mode;"
        "print(get_authentication_mode() == Mode.TOKEN, AuthenticationTokenLoader.instance().has_token())"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_user_without_a_home_folder_is_refused_with_what_to_set(monkeypatch: pytest.MonkeyPatch):
    """As in containers that run as a number: there Ray Train cannot even be imported."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match=r"HOME is not set, and user 12345 is not in /etc/passwd; `export HOME=`"):
        require_ray(load("digits"))
    check = ray_check(load("digits"))
    assert not check.ok
    assert check.remedy == "`export HOME=` and a folder that can be written"
