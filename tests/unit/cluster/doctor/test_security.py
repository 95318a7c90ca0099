"""`glann doctor` finds Ray without a token, MLflow without accounts, S3 without encryption and readable token files."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from glann.cluster.doctor import checks as doctor
from glann.cluster.doctor import security
from glann.cluster.nodes.ray import protect_local_ray
from glann.config.run import Config, load
from glann.tracking.doctor import tracking

ELSEWHERE = "127.0.0.2"  # stands for this machine's address in its network


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    prefixes = ("RAY_AUTH", "RAY_ADDRESS", "MLFLOW_", "AWS_")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        monkeypatch.delenv(name)
    return tmp_path


def cluster() -> Config:
    return load("digits", ["cluster.address=auto"])


@pytest.mark.parametrize(
    ("mode", "token", "ok"),
    [
        (None, "", False),
        ("token", "", False),
        ("token", "secret", True),
        ("disabled", "", False),
        ("tokens", "x", False),
    ],
)
def test_a_cluster_needs_a_token_and_the_remedy_says_so(
    mode: str | None, token: str, ok: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    check = security.auth_mode(cluster())
    assert check.ok == ok
    assert bool(check.remedy) != ok
    assert "secret" not in str(check)


def test_a_local_ray_is_good_unless_its_token_was_switched_off(monkeypatch: pytest.MonkeyPatch):
    """A local Ray listens on every interface too, so `disabled` is a failure."""
    assert security.auth_mode(load("digits")).ok
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert security.auth_mode(load("digits")).ok
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    check = security.auth_mode(load("digits"))
    assert (check.ok, "unset RAY_AUTH_MODE" in check.remedy) == (False, True)


def test_a_local_ray_gets_a_random_token(monkeypatch: pytest.MonkeyPatch):
    tokens = set()
    for _ in range(2):
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        protect_local_ray()
        assert os.environ["RAY_AUTH_MODE"] == "token"
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2
    assert all(len(token) >= 32 for token in tokens)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the user's own choice is kept
    protect_local_ray()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize(("mode", "ok"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False), (0o602, False)])
def test_a_token_that_others_can_read_is_bad(mode: int, ok: bool, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    path = elsewhere / "token"
    path.write_text("secret")
    path.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    check = security.auth_mode(cluster())
    assert check.ok == ok
    assert check.remedy == ("" if ok else f"chmod 600 {path}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")  # comes before the file, as in Ray itself
    assert security.auth_mode(cluster()).ok


class Tracker(http.server.BaseHTTPRequestHandler):
    """MLflow's health page, and a call that requires a login where there are accounts."""

    password: str | None = None
    seen: list[str] = []  # noqa: RUF012 - of the class on purpose: every request makes a new handler

    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization", "")
        self.seen.append(f"{self.headers['Host']} {self.path} {authorization}")
        open_page = self.path == "/health" or self.password is None
        # MLflow checks the Host header, which an attacker can choose
        status = 403 if not self.headers["Host"].startswith("127.0.0.1") else 200 if open_page or authorization else 401
        self.send_response(status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def tracker(host: str, password: str | None = None) -> Iterator[int]:
    handler = type("Handler", (Tracker,), {"password": password, "seen": []})
    with http.server.ThreadingHTTPServer((host, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def mlflow_checks(uri: str) -> dict[str, doctor.Check]:
    return {check.name: check for check in tracking(load("digits", [f"tracking.uri={uri}"]))}


@pytest.mark.parametrize(
    ("host", "password", "ok"),
    [
        ("127.0.0.1", None, True),  # loopback
        ("0.0.0.0", None, False),
        ("0.0.0.0", "hunter2", True),
    ],
)
def test_a_tracking_server_without_accounts_that_others_reach_is_bad(
    host: str, password: str | None, ok: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(security, "own_address", lambda: ELSEWHERE)
    with tracker(host, password) as port:
        found = mlflow_checks(f"http://127.0.0.1:{port}")
    assert found["mlflow server"].ok
    assert found["mlflow access"].ok == ok, found
    assert ("basic-auth" in found["mlflow access"].remedy) != ok


@pytest.mark.parametrize("place", ["http://me:hunter2@127.0.0.1:{}", "http://me:hunter2@127.0.0.1:{}/"])
def test_a_password_in_the_address_is_used_and_never_shown(place: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(security, "own_address", lambda: None)
    with tracker("127.0.0.1", "hunter2") as port:
        found = mlflow_checks(place.format(port))
    assert all(check.ok for check in found.values()), found
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    "uri", ["http://me:hunter2@nowhere.invalid", "http://me:hunter2@127.0.0.1:1x", "http://:a b@h"]
)
def test_an_address_that_does_not_answer_is_bad_without_its_password(uri: str):
    found = mlflow_checks(uri)
    assert not found["mlflow server"].ok
    assert "hunter2" not in str(found)


def test_a_password_over_plain_http_to_another_machine_is_bad(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(security, "is_loopback", lambda host: False)
    with tracker("127.0.0.1", "hunter2") as port:
        for uri, env in ((f"http://me:hunter2@127.0.0.1:{port}", ""), (f"http://127.0.0.1:{port}", "hunter2")):
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", env)
            check = mlflow_checks(uri)["mlflow access"]
            assert (check.ok, "unencrypted" in check.found) == (False, True)
            assert "hunter2" not in str(check)


@pytest.mark.parametrize(
    ("endpoint", "ok"),
    [
        (None, True),
        ("https://minio.example:9000", True),
        ("http://127.0.0.1:9000", True),
        ("http://[::1]:9000", True),
        ("http://localhost:9000", True),
        ("http://minio.example:9000", False),
        ("http://10.0.0.7:9000", False),
    ],
)
@pytest.mark.parametrize("by", ["s3.endpoint_url", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_s3_in_the_clear_to_another_machine_is_bad(
    endpoint: str | None, ok: bool, by: str, monkeypatch: pytest.MonkeyPatch
):
    overrides = ["checkpoint.url=s3://bucket/runs"]
    if endpoint and by.startswith("AWS"):
        monkeypatch.setenv(by, endpoint)
    elif endpoint:
        overrides.append(f"{by}={endpoint}")
    check = security.storage_transport(load("digits", overrides))
    assert check is not None
    assert check.ok == ok
    assert security.storage_transport(load("digits")) is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1", "a.localhost"])
def test_loopback_is_recognised(host: str):
    assert security.is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "10.0.0.1", "localhost.example", "127.0.0.1.example", "::"])
def test_what_is_not_loopback_is_not(host: str):
    assert not security.is_loopback(host)
