"""A user's machine beside a `cluster_nodes.Cluster`: from here jobs are submitted, watched and fetched."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time

from cluster_nodes import HEAD, Cluster
from netns import wait_until

DESK, DASHBOARD_PORT = "desk", 8265
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")


class Desk:
    """`took`: seconds of every command, in order. `folder`: where the commands run, as it is seen from outside."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.net.add(DESK, 40)
        self.folder = cluster.net.disk(DESK)
        dashboard = f"http://{cluster.net.addresses[HEAD]}:{DASHBOARD_PORT}"
        mine = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
        self.env = mine | {"RAY_API_SERVER_ADDRESS": dashboard}
        self.took: list[tuple[str, float]] = []

    def glann(self, *words: str, seconds: float = 300) -> str:
        """What a `glann` command prints.

        Raises:
            RuntimeError: it ended with another status than 0.
        """
        return self.python("-m", "glann", *words, seconds=seconds)

    def python(self, *words: str, seconds: float = 300) -> str:
        """What a Python program prints."""
        began = time.monotonic()
        done = subprocess.run(
            self.cluster.net.command(DESK, sys.executable, *words),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        said = " ".join(("glann", *words[2:5]) if words[0] == "-m" else ("python", *words[:1]))
        self.took.append((said, time.monotonic() - began))
        if done.returncode:
            raise RuntimeError(f"{said} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout + done.stderr

    def wait_for_dashboard(self) -> None:
        """Until Ray's dashboard answers, be it that it wants a token."""

        def answers() -> bool:
            with self.cluster.net.inside(DESK):
                try:
                    server = http.client.HTTPConnection(self.cluster.net.addresses[HEAD], DASHBOARD_PORT, timeout=5)
                    server.request("GET", "/api/version")
                    server.getresponse()
                except OSError:
                    return False
                return True

        wait_until(answers, 120, "Ray's dashboard does not answer", 0.5)
