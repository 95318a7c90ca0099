"""A real Ray head with its dashboard, as `ray start` makes one: own ports, own folders, token on."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

START_PATIENCE_S = 180.0


@dataclass(frozen=True)
class Head:
    """Addresses of the dashboard and of the cluster, what a client needs in its environment, and the user's home."""

    address: str
    cluster: str
    env: dict[str, str]
    home: Path


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, away from 10002-19999, which Ray keeps for workers."""
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            bound = stack.enter_context(socket.socket())
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
            if not 10002 <= port <= 19999:
                found.append(port)
    return found


@contextmanager
def ray_head(cpus: int = 4) -> Iterator[Head]:
    """A head until the end of the block, and nothing of it afterwards."""
    with tempfile.TemporaryDirectory(prefix="rh-", ignore_cleanup_errors=True) as base:  # sockets: short paths
        folder = Path(base)
        home = folder / "home"
        home.mkdir()
        (folder / "token").write_text(secrets.token_hex(32))
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        port, dashboard, agent, client = free_ports(4)
        log = folder / "head.log"
        cache = os.environ.get("GLANN_CACHE") or str(Path.home() / ".cache" / "glann")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        foreign = ("RAY_", "MLFLOW_", "AWS_", "PYTHONPATH")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        env = kept | auth | {"HOME": str(home), "GLANN_CACHE": cache, "PATH": path, "OMP_NUM_THREADS": "1"}
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            *(f"--temp-dir={folder / 'ray'}", f"--num-cpus={cpus}", "--object-store-memory=200000000"),
        ]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=home, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _wait_for(address, process, log)
            yield Head(address, f"127.0.0.1:{port}", auth, home)
        finally:
            process.terminate()  # ends its children, too
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            _end_the_rest(base)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the dashboard answers, be it that it wants a token."""
    deadline = time.monotonic() + START_PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no head: {log.read_text()[-2000:]}")


def _end_the_rest(base: str) -> None:
    """End what still runs out of the head's folders, such as the worker of a job."""
    for entry in Path("/proc").iterdir():
        try:
            mine = entry.name.isdigit() and int(entry.name) != os.getpid()
            if mine and base.encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue
