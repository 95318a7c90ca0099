"""Record docs/cluster.md's transcript: `glann submit` from a machine outside a cluster of real nodes.

    sudo .venv/bin/python docs/record_submit.py

Brings up a head and two workers, S3 and MLflow, each with a network of its own (`tests/support/cluster_nodes.py`),
and a laptop that has the cluster's token and nothing of Ray running. Submits a small run, stops it once it has saved,
submits it again to its end, and prints what a user saw. Needs root, iproute2 and the test tools.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from cluster_job import pack_digits
from cluster_nodes import BIN, HEAD, WORKERS, Cluster
from glann.reports.status import read_status
from netns import why_not

LAPTOP = "laptop"
OF_NODES = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")  # what the nodes know and a laptop does not
RECIPE = """\
name: digits-2
data: {url: s3://glann/digits, resolution: 28, channels: 1}
generator: {kind: infogan, latent_dim: 16, width: 8}
loss: {kind: l1}
glo: {epochs: 60, batch_size: 40}
sampler: {epochs: 8, batch_size: 40}
checkpoint: {url: s3://glann/runs, every_epochs: 10}
cluster: {workers: 2}
evaluation: {samples: 100}
"""
SUBMIT = "submit digits-on-s3.yaml --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY --env AWS_ENDPOINT_URL"


def main() -> int:
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with Cluster(dashboard=True, workers=WORKERS[:2]) as cluster:
        pack_digits(cluster)
        cluster.net.add(LAPTOP, 40)
        (cluster.net.disk(LAPTOP) / "digits-on-s3.yaml").write_text(RECIPE)
        url = f"http://{cluster.net.addresses[HEAD]}:8265"
        cluster.env |= {"RAY_API_SERVER_ADDRESS": url, "COLUMNS": "120"}
        print(f"$ export RAY_API_SERVER_ADDRESS={url}\n$ cat digits-on-s3.yaml\n{RECIPE}", flush=True)
        show(cluster, SUBMIT)
        wait_for_checkpoint(cluster)
        wait_for_status(cluster)
        look = "jobs status digits-2"
        for words in (look, "jobs stop digits-2", look, f"{SUBMIT} --wait", "jobs list --runs s3://glann/runs"):
            show(cluster, words)
    return 0


def show(cluster: Cluster, words: str) -> None:
    """Run `glann` on the laptop, and print the command and what it says, as it says it."""
    print(f"$ glann {words}", flush=True)
    status = glann(cluster, words).wait(900)
    print(f"[exit status {status}]\n" if status else "", flush=True)


def wait_for_checkpoint(cluster: Cluster, seconds: float = 300) -> None:
    """Until the run has a checkpoint, of which the manifest is written last."""
    with cluster.store("s3://glann/runs/digits-2/checkpoints") as store:
        for _ in range(int(seconds)):
            if any(key.endswith("manifest.json") for key in store.list()):
                return
            time.sleep(1)
    raise TimeoutError(f"no checkpoint in {seconds:g} s")


def wait_for_status(cluster: Cluster, seconds: float = 60) -> None:
    """Until the status beside the checkpoints names one, and the devices, which are sampled every few seconds."""
    with cluster.store("s3://glann/runs/digits-2") as store:
        for _ in range(int(seconds)):
            status = read_status(store)
            if status is not None and status.checkpoint_at and status.devices:
                return
            time.sleep(1)
    raise TimeoutError(f"no checkpoint in the status in {seconds:g} s")


def glann(cluster: Cluster, words: str) -> subprocess.Popen[bytes]:
    env = {name: value for name, value in cluster.env.items() if name not in OF_NODES}
    return cluster.net.start(LAPTOP, str(BIN / "glann"), *words.split(), env=env, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    sys.exit(main())
