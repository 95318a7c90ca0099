"""Security checks of `glann doctor`: access from the network, and by other users of this machine.

Ray runs any code that is sent to its ports, an MLflow server without accounts accepts every request, and plain HTTP can
be read and changed in transit. Servers that listen on the loopback interface alone pass.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import os
import shlex
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import SplitResult, unquote, urlsplit

from ...config.paths import expand
from ...config.run import Config
from ...errors import UserError, redact
from ...storage.proxy import proxy_hint
from ...storage.s3_address import endpoint_of
from ..nodes.address import listens, ray_address
from .check import Check

TIMEOUT_S = 5.0
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"  # requires a login where MLflow has accounts
RAY_REMEDY = "start every node with RAY_AUTH_MODE=token and the same token (`ray get-auth-token --generate`)"


def auth_mode(config: Config | None) -> Check:
    """Check this process's token settings: they must be those of the head, or joining the cluster fails."""
    mode, local = os.environ.get("RAY_AUTH_MODE"), ray_address(config) is None
    if mode is None:
        if local:
            return Check("ray auth", True, "a local Ray gets a token of its own")
        return Check("ray auth", False, "RAY_AUTH_MODE is not set", "export RAY_AUTH_MODE=token as on the head node")
    if mode == "disabled":
        remedy = "unset RAY_AUTH_MODE: a local Ray then gets a token of its own" if local else RAY_REMEDY
        return Check("ray auth", False, "disabled: anyone who reaches Ray's ports can run code here", remedy)
    if mode != "token":
        return Check("ray auth", False, f"RAY_AUTH_MODE={mode}", "use token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Check("ray auth", True, "token")
    try:
        path = expand(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
    except UserError:
        return Check("ray auth", False, "no home folder for ~/.ray/auth_token", "set HOME, or RAY_AUTH_TOKEN_PATH")
    if not path.is_file():
        if local:
            return Check("ray auth", True, f"token; a local Ray makes one in {path}")
        return Check("ray auth", False, f"no token at {path}", "copy ~/.ray/auth_token from the head node")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        found = f"other users of this machine can use the token in {path}"
        return Check("ray auth", False, found, shlex.join(["chmod", "600", str(path)]))
    return Check("ray auth", True, "token")


def tracking_server(config: Config) -> Iterator[Check]:
    """Check that the MLflow server at an http address answers and requires authentication."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    shown = redact(uri)
    try:
        split = urlsplit(uri)
        base = f"{split.scheme}://{_place(split)}{split.path.rstrip('/')}"
    except ValueError:  # an invalid port
        yield Check("mlflow server", False, f"{shown} is not a valid address", "correct tracking.uri")
        return
    remedy = "start it with `mlflow server`, correct tracking.uri, or set tracking.enabled=false"
    status, reason = _get(f"{base}/health", _authorization(split))
    if status != 200:
        yield Check("mlflow server", False, f"{shown}: {reason}", remedy + proxy_hint(base))
        return
    yield Check("mlflow server", True, shown)
    yield _mlflow_access(split, base)


def _mlflow_access(split: SplitResult, base: str) -> Check:
    """Check that the tracking server requires a login and gets no password over plain HTTP."""
    here = is_loopback(split.hostname or "")
    secured = split.scheme == "https" or here
    if not secured and (split.password or any(os.environ.get(name) for name in _MLFLOW_SECRETS)):
        return Check("mlflow access", False, f"the password is sent to {base} unencrypted", "serve it by https://")
    outside = base if not here else _from_outside(split)
    if outside and _get(f"{outside}{SEARCH}", {"Host": split.netloc.rpartition("@")[2]})[0] == 200:
        return Check(
            "mlflow access",
            False,
            f"{outside} accepts runs and models from anyone who reaches it",
            "start it with `mlflow server --app-name basic-auth`, or with --host 127.0.0.1 for this machine alone",
        )
    return Check("mlflow access", True, "loopback only" if here and not outside else "requires a login")


_MLFLOW_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def _from_outside(split: SplitResult) -> str:
    """The address under which other machines reach a server of this machine's loopback interface, or ""."""
    port = split.port or 80
    address = own_address()
    if address is None or not listens(address, port):
        return ""
    return f"{split.scheme}://{address}:{port}{split.path.rstrip('/')}"


def storage_transport(config: Config) -> Check | None:
    """Check that traffic with S3 is encrypted; None if the run does not use S3."""
    if not any(url.startswith("s3://") for url in config.places):
        return None
    try:
        endpoint = endpoint_of(config.s3)
    except UserError as error:
        return Check("s3 transport", False, str(error), "correct s3.endpoint_url (or AWS_ENDPOINT_URL)")
    split = urlsplit(endpoint or "https://s3.amazonaws.com")
    if split.scheme == "http" and not is_loopback(split.hostname or ""):
        return Check(
            "s3 transport",
            False,
            f"{redact(str(endpoint))} is not encrypted: images and models can be read and changed in transit",
            "serve S3 by https:// and set s3.endpoint_url (or AWS_ENDPOINT_URL) to that",
        )
    return Check("s3 transport", True, "encrypted" if split.scheme == "https" else "loopback only")


def is_loopback(host: str) -> bool:
    """Whether the name or address is of the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def own_address() -> str | None:
    """This machine's address in its network; None without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a datagram socket: this sends nothing
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if is_loopback(address) else address


def _place(split: SplitResult) -> str:
    host = f"[{split.hostname}]" if ":" in (split.hostname or "") else split.hostname or ""
    return f"{host}:{split.port}" if split.port else host


def _authorization(split: SplitResult) -> dict[str, str]:
    if not split.password:
        return {}
    pair = f"{unquote(split.username or '')}:{unquote(split.password)}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _get(url: str, headers: dict[str, str]) -> tuple[int, str]:
    """The status of a page, or 0 without an answer, and the reason of a failure."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, f"answers with HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return 0, redact(str(getattr(error, "reason", error)))
