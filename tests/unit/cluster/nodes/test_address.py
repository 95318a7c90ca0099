"""An address without a Ray head is refused in seconds and one line; Ray itself waits for a quarter of an hour."""

from __future__ import annotations

import http.server
import os
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from glann.cluster.nodes import address
from glann.cluster.nodes.address import require_head
from glann.cluster.nodes.ray import ray_cluster
from glann.cluster.nodes.ray_private import Refusal
from glann.config.run import load
from glann.errors import EnvironmentFault, UserError


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    os.environ.clear()  # joining sets variables for Ray
    os.environ.update(before)


class Dashboard(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def closed() -> str:
    """An address of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def dashboard() -> Iterator[str]:
    """A server that is no Ray head, such as Ray's own dashboard."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def refused(where: str, kind: type[Exception]) -> str:
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        require_head(where)
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_that_listens_is_refused_at_once(closed: str):
    assert f"nothing answers at {closed}, where a Ray head should; correct the address" in refused(
        closed, EnvironmentFault
    )


def test_a_variable_that_is_left_over_from_another_cluster_is_named(closed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", closed)
    for where in (closed, "auto"):
        assert f"{closed} (RAY_ADDRESS), where a Ray head should; unset RAY_ADDRESS" in refused(where, EnvironmentFault)


def test_a_server_that_is_no_head_is_refused_without_lines_of_ray(dashboard: str, capfd: pytest.CaptureFixture[str]):
    assert f"what answers at {dashboard} is no Ray head" in refused(dashboard, EnvironmentFault)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_head_is_not_asked_through_a_proxy(name: str, dashboard: str, monkeypatch: pytest.MonkeyPatch):
    """As Ray itself does: a proxy for the internet, or one that is gone, must not make a good cluster look dead."""
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    said = refused(dashboard, EnvironmentFault)
    assert dashboard in said.partition("no Ray head")[2], f"another address was called: {said}"


@pytest.mark.parametrize(
    "where",
    ["", "10.0.0.1", "10.0.0.1:", "10.0.0.1:99999", "[::1", "a:b@c:6379", "10.0.0.1:6379/x", f"{'x' * 64}:1", "a..b:1"],
)
def test_what_is_no_address_says_what_one_is(where: str):
    assert "is no address of a Ray head; give the head's HOST:PORT" in refused(where, UserError)


@pytest.mark.parametrize("where", ["http://127.0.0.1:8265", "ray://10.0.0.1:10001"])
def test_the_address_of_a_dashboard_is_for_another_command(where: str):
    assert "`glann submit --address`" in refused(where, UserError)


def test_auto_without_a_node_on_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(address, "find_head", lambda: None)
    assert "no Ray runs on this machine" in refused("auto", EnvironmentFault)


def test_a_refused_token_is_the_users_to_mend(dashboard: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(address, "head_refusal", lambda head: Refusal(token=True, reason="InvalidAuthToken"))
    assert "does not accept this process's token: InvalidAuthToken; copy" in refused(dashboard, UserError)


@pytest.mark.parametrize("key", ["RAY_ADDRESS", "cluster.address"])
def test_a_run_does_not_wait_for_a_cluster_that_is_gone(key: str, closed: str, monkeypatch: pytest.MonkeyPatch):
    """`glann train`, a trial of `glann tune` and a driver in a job all join by `ray_cluster`."""
    if key == "RAY_ADDRESS":
        monkeypatch.setenv(key, closed)
    config = load("digits", [] if key == "RAY_ADDRESS" else [f"{key}={closed}"])
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match=re.escape(f"nothing answers at {closed}")), ray_cluster(config):
        pytest.fail("joined")
    assert time.monotonic() - began < 10
