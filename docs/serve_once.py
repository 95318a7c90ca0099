"""Serve a registered model with MLflow's own server, ask it for images over HTTP, save them, and end the server.

    python docs/serve_once.py models:/digits@champion --out served.png

docs/registry.md has the server by itself; this is its whole life in one command.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from glann.reports.pictures import grid

START_PATIENCE_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="such as models:/digits@champion")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("served.png"))
    given = parser.parse_args()
    with served(given.model) as url:
        body = json.dumps({"inputs": {"n": given.n, "seed": given.seed}}).encode()
        request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        began = time.monotonic()
        with urllib.request.urlopen(request, timeout=60) as answer:
            images_NHWC = np.array(json.load(answer)["predictions"], dtype=np.uint8)
        took = time.monotonic() - began
    grid(images_NHWC).save(given.out)
    print(f"{given.model} answered over HTTP with {len(images_NHWC)} images in {took:.2f} s: {given.out}")


@contextmanager
def served(model: str) -> Iterator[str]:
    """Address of a server of the model, on a free port, until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow calls uvicorn by name
    env = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"} | os.environ | {"PATH": path}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield url
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(15)


def wait_for(url: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{url}/ping", timeout=5).close()
            return
        time.sleep(0.3)
    log.seek(0)
    sys.exit(f"error: the server did not start:\n{log.read().decode(errors='replace')[-2000:]}")


if __name__ == "__main__":
    main()
