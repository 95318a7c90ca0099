"""Draining of a node that is about to be taken away, early enough for the runs on it to save and move.

`ray start --block` drains its node itself on SIGTERM, and waits RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S. This is for
cases without such a signal, or with a late one: a deleted pod, maintenance, an EC2 spot machine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from datetime import datetime

from ...errors import EnvironmentFault, GlannError, redact
from .address import ray_address, require_head
from .ray_private import COORDINATOR_ACTOR, actors_on_node, is_node_alive, request_drain

POLL_S = 2.0
NOTICE_POLL_S = 5.0  # as EC2 advises
JOIN_S = 60.0
METADATA, NOTICE = "http://169.254.169.254", "latest/meta-data/spot/instance-action"

# In a process of its own: a failed connection, or the end of the connected node, can end the process.
_WHERE = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
context = ray.get_runtime_context()
print("NODE", context.get_node_id(), context.gcs_address)
"""


def drain(within_s: float, reason: str) -> bool:
    """Send a drain notice for this machine's Ray node, and wait until everything on it has ended.

    Args:
        within_s: seconds from now until the node is gone.
        reason: for the cluster's log.

    Returns:
        Whether the node was empty in time.

    Raises:
        EnvironmentFault: no Ray node runs here, or its head refuses the notice.
    """
    node, head = this_machines_node()
    deadline = time.time() + within_s
    _send_notice(head, node, reason, deadline)
    while time.time() < deadline:
        time.sleep(POLL_S)
        with contextlib.suppress(Exception):  # retry while the head is busy
            if not is_node_alive(head, node):
                return True
            _end_coordinator(head, node)
    return False


def _send_notice(head: str, node: str, reason: str, deadline: float) -> None:
    try:
        accepted, refusal = request_drain(head, node, reason, deadline)
    except Exception as error:  # Ray has no common base class for these
        raise EnvironmentFault(f"the head {head} does not accept the drain notice: {error}") from error
    if not accepted:
        raise EnvironmentFault(f"the head {head} refuses the drain notice: {refusal}")


def _end_coordinator(head: str, node: str) -> None:
    """End Ray's own actor once it is the only one on the node, which would otherwise never become idle."""
    actors = actors_on_node(head, node)
    if all(actor.class_name == COORDINATOR_ACTOR for actor in actors):
        for actor in actors:
            os.kill(actor.pid, signal.SIGKILL)


def this_machines_node() -> tuple[str, str]:
    """Id of the Ray node on this machine, and the address of its head.

    Raises:
        EnvironmentFault: no Ray node runs here.
    """
    address = ray_address(None) or "auto"
    try:
        require_head(address)
    except GlannError as error:
        raise EnvironmentFault(f"no Ray node runs on this machine: {error}") from error
    try:
        command = [sys.executable, "-P", "-c", _WHERE, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=JOIN_S)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"Ray does not answer on this machine within {JOIN_S:g} s") from error
    for line in done.stdout.splitlines():
        if line.startswith("NODE "):
            _, node, head = line.split()
            return node, head
    lines = redact(done.stderr).strip().splitlines() or ["no reason given"]
    raise EnvironmentFault(f"no Ray node runs on this machine: {lines[-1][:200]}; check RAY_ADDRESS and RAY_AUTH_MODE")


def wait_for_spot_notice() -> float:
    """Wait for EC2's interruption notice of this spot machine.

    Returns:
        Seconds until the machine is taken away.

    Raises:
        EnvironmentFault: no EC2 metadata service answers here.
    """
    try:
        _token()
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentFault(f"no EC2 metadata service answers here ({error}); is this an EC2 machine?") from error
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):  # no notice yet
            notice = json.loads(_request(NOTICE, {"X-aws-ec2-metadata-token": _token()}))
            return datetime.fromisoformat(notice["time"]).timestamp() - time.time()
        time.sleep(NOTICE_POLL_S)


def _token() -> str:
    return _request("latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")


def _request(path: str, headers: dict[str, str], method: str = "GET") -> str:
    """Answer of the metadata service; a missing notice is an HTTPError, which is an OSError."""
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA).rstrip("/")
    request = urllib.request.Request(f"{base}/{path}", headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read(65536).decode()
