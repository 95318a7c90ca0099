"""The address of a Ray head: which one is configured, and whether a head answers there.

Ray itself waits for a head that is gone for a quarter of an hour, so the question is put here first.
"""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from ...config.run import Config
from ...errors import EnvironmentFault, UserError
from .ray_private import find_head, head_refusal

CONNECT_S = 5.0
REMEDY = "give the head's HOST:PORT, as `ray start --head` printed it"


def ray_address(config: Config | None) -> str | None:
    """The address of the cluster that a run would join; None for a local Ray."""
    address = (config.cluster.address if config else None) or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def require_head(address: str) -> None:
    """Refuse an address at which no Ray head answers, in seconds.

    Args:
        address: host:port, or auto for the head of this machine's node.
    Raises:
        UserError: it is no address of a head, or the head does not accept this process's token.
        EnvironmentFault: nothing answers there, or nothing that is a Ray head.
    """
    head = find_head() if address == "auto" else address
    if head is None:
        raise EnvironmentFault("no Ray runs on this machine, to which address auto refers; start it with `ray start`")
    given = os.environ.get("RAY_ADDRESS") == head
    where = f"{head} (RAY_ADDRESS)" if given else head
    host, port = host_and_port(head, where)
    if not listens(host, port):
        remedy = "unset RAY_ADDRESS" if given else "correct the address"
        raise EnvironmentFault(f"nothing answers at {where}, where a Ray head should; {remedy}, or start that cluster")
    if (refusal := head_refusal(head)) is None:
        return
    if not refusal.token:
        raise EnvironmentFault(f"what answers at {where} is no Ray head ({refusal.reason}); {REMEDY}")
    raise UserError(
        f"the Ray head at {where} does not accept this process's token: {refusal.reason}; copy the head's "
        "~/.ray/auth_token here and set RAY_AUTH_MODE=token"
    )


def host_and_port(address: str, where: str) -> tuple[str, int]:
    """The parts of `host:port`; `where`: the address as errors show it. Raises UserError."""
    try:
        split = urlsplit(f"//{address}")
        if is_host(split.hostname) and split.port and split.netloc == address and "@" not in address:
            return str(split.hostname), split.port
    except ValueError:  # an invalid port, or brackets without a partner
        pass
    hint = ", or auto (the dashboard's is for `glann submit --address`)" if "://" in address else ", or auto"
    raise UserError(f"{where} is no address of a Ray head; {REMEDY}{hint}")


def is_host(name: str | None) -> bool:
    """Whether a name can be looked up (RFC 1035, section 2.3.4): libraries fail in their own ways at longer ones."""
    labels = (name or "").rstrip(".").split(".")
    return len(name or "") <= 253 and all(0 < len(label) <= 63 for label in labels)


def listens(host: str, port: int) -> bool:
    """Whether a server accepts connections there."""
    try:
        with socket.create_connection((host, port), CONNECT_S):
            return True
    except OSError:
        return False
