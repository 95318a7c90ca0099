"""A node that is about to be taken away: Ray is told in time, so that the runs on it save and go elsewhere.

`ray start --block` tells Ray itself when it gets SIGTERM, and waits RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S. This is for
where no such signal comes, or too late: a pod that is deleted, maintenance, a spot machine of EC2.
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
from urllib.parse import urlsplit

from ...errors import EnvironmentFault, redact
from .ray import listens, ray_address
from .ray_private import COORDINATOR_ACTOR, actors_on_node, is_node_alive, request_drain

POLL_S = 2.0
NOTICE_POLL_S = 5.0  # as EC2 advises
JOIN_S = 60.0
METADATA = "http://169.254.169.254"

# A failed connection can end the process that tries it, and so can the end of the node that it is connected to.
_WHERE = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
context = ray.get_runtime_context()
print("NODE", context.get_node_id(), context.gcs_address)
"""


def leave(within_s: float, why: str) -> bool:
    """Give this machine's Ray node notice, and wait until everything on it has ended.

    Args:
        within_s: seconds from now until the node is gone.
        why: what the cluster's log says of it.

    Returns:
        Whether it was left in time.

    Raises:
        EnvironmentFault: there is no Ray node here, or its head does not take the notice.
    """
    node, head = this_machines_node()
    deadline = time.time() + within_s
    _give_notice(head, node, why, deadline)
    while time.time() < deadline:
        time.sleep(POLL_S)
        with contextlib.suppress(Exception):  # a head that is busy is asked again
            if not is_node_alive(head, node):
                return True
            _end_coordinator(head, node)
    return False


def _give_notice(head: str, node: str, why: str, deadline: float) -> None:
    try:
        accepted, refusal = request_drain(head, node, why, deadline)
    except Exception as error:  # Ray has no common class for what a head may answer
        raise EnvironmentFault(f"the head {head} does not take the notice: {error}") from error
    if not accepted:
        raise EnvironmentFault(f"the head {head} refuses the notice: {refusal}")


def _end_coordinator(head: str, node: str) -> None:
    """End Ray's own actor once it is the only one on the node, which would otherwise never become idle."""
    actors = actors_on_node(head, node)
    if all(actor.class_name == COORDINATOR_ACTOR for actor in actors):
        for actor in actors:
            os.kill(actor.pid, signal.SIGKILL)


def this_machines_node() -> tuple[str, str]:
    """Id of the Ray node that runs here, and the address of its head. Raises EnvironmentFault: there is none."""
    address = ray_address(None) or "auto"
    split = urlsplit(f"//{address}")
    if split.hostname and split.port and not listens(split.hostname, split.port):
        raise EnvironmentFault(f"no Ray node runs on this machine: nothing answers at {address}; check RAY_ADDRESS")
    try:
        words = [sys.executable, "-c", _WHERE, address]
        done = subprocess.run(words, capture_output=True, text=True, timeout=JOIN_S)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"Ray does not answer on this machine within {JOIN_S:g} s") from error
    for line in done.stdout.splitlines():
        if line.startswith("NODE "):
            _, node, head = line.split()
            return node, head
    said = redact(done.stderr).strip().splitlines() or ["no reason was given"]
    raise EnvironmentFault(f"no Ray node runs on this machine: {said[-1][:200]}; check RAY_ADDRESS and RAY_AUTH_MODE")


def wait_for_spot_notice() -> float:
    """Wait until EC2 says that it takes this spot machine away; the seconds that are left.

    Raises:
        EnvironmentFault: no EC2 metadata service answers here.
    """
    try:
        _token()
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentFault(f"no EC2 metadata service answers here ({error}); is this an EC2 machine?") from error
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):  # asked again
            notice = json.loads(_ask("latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": _token()}))
            return datetime.fromisoformat(notice["time"]).timestamp() - time.time()
        time.sleep(NOTICE_POLL_S)


def _token() -> str:
    return _ask("latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")


def _ask(path: str, headers: dict[str, str], method: str = "GET") -> str:
    """An answer of the metadata service; a notice that is not there is an HTTPError, which is an OSError."""
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA).rstrip("/")
    request = urllib.request.Request(f"{base}/{path}", headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read(65536).decode()
