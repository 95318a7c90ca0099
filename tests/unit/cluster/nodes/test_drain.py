"""`glann drain`: the notice of EC2's metadata service, one line where no node is, and the deprecated name."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from glann.cli import main as cli
from glann.cluster.nodes import drain
from glann.errors import EnvironmentFault


class Metadata(BaseHTTPRequestHandler):
    """EC2's metadata service in its second version: only with a token, and no notice at first."""

    asked = 0
    gone_at = ""

    def do_PUT(self):
        assert self.path == "/latest/api/token"
        self.answer(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, "a-token")

    def do_GET(self):
        assert self.path == "/latest/meta-data/spot/instance-action"
        if self.headers["X-aws-ec2-metadata-token"] != "a-token":
            return self.answer(401, "")
        Metadata.asked += 1
        if Metadata.asked <= 2:
            return self.answer(404, "")
        return self.answer(200, json.dumps({"action": "terminate", "time": self.gone_at}))

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(drain, "NOTICE_POLL_S", 0.01)
    Metadata.asked = 0
    yield Metadata
    server.shutdown()
    server.server_close()


def test_the_notice_is_waited_for_and_gives_the_time_that_is_left(metadata):
    metadata.gone_at = (datetime.now(UTC) + timedelta(minutes=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert 115 < drain.wait_for_spot_notice() <= 120
    assert metadata.asked == 3


def test_a_machine_that_is_not_of_ec2_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        EnvironmentFault, match=r"^no EC2 metadata service answers here \(.*\); is this an EC2 machine\?$"
    ):
        drain.wait_for_spot_notice()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "auto"])
def test_a_machine_without_ray_is_one_line(monkeypatch, capsys, tmp_path, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray looks for a node that was started here
    with pytest.raises(SystemExit) as ended:
        cli.main(["drain"])
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: no Ray node runs on this machine: ")


@pytest.mark.parametrize("emptied", [True, False])
def test_the_former_name_does_the_same_and_says_so_in_one_line(monkeypatch, capsys, emptied):
    """`glann leave` is in preStop hooks and set-up commands of clusters that were made before it was renamed."""
    calls, outputs = [], {}
    monkeypatch.setattr(drain, "drain", lambda within_s, reason: calls.append((within_s, reason)) or emptied)
    for name in ("drain", "leave"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--within", "60"])
        assert (ended.value.code or 0) == (0 if emptied else 1)
        outputs[name] = capsys.readouterr()
    assert calls == [(60.0, "glann drain")] * 2
    assert outputs["leave"].out == outputs["drain"].out
    note, *rest = outputs["leave"].err.splitlines(keepends=True)
    assert note == "note: `glann leave` is deprecated; use `glann drain`, which does the same\n"
    assert "".join(rest) == outputs["drain"].err


def test_the_former_name_waits_for_the_spot_notice_too(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(drain, "wait_for_spot_notice", lambda: 120.0)
    monkeypatch.setattr(drain, "drain", lambda within_s, reason: calls.append((within_s, reason)) or True)
    for name in ("drain", "leave"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--on-spot-notice"])
        assert not ended.value.code
    assert calls == [(110.0, "EC2 reclaims this spot instance")] * 2
    capsys.readouterr()


def test_only_the_present_name_is_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    assert " drain " in listed
    assert " leave " not in listed
