"""The job this product exists for, small: photographs of 1024 px, from files to a model that is served.

Everything is as on a real cluster: a user's machine, S3, MLflow by `glann mlflow`, Ray's job server, two worker nodes,
and a head with the memory of our KubeRay file, which is lost in the middle of the training together with all nodes and
MLflow's machine. Width, rows and epochs are cut, and the loss network is SqueezeNet, which sees patches. Wall times and
peaks of memory are printed.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from cgroups import GIB, Peaks
from cgroups import why_not as no_groups
from cluster_nodes import BUCKET, HEAD, MLFLOW, WORKERS, Cluster
from desk import KEYS, Desk
from glann.config.run import load
from glann.models.cost import inference_bytes
from glann.models.generators import generator_of
from netns import why_not as no_network
from photographs import SIDE, write_photographs

pytestmark = [pytest.mark.netns, pytest.mark.matrix, pytest.mark.network, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
NAME, DATA, RUNS = "photographs-1024", f"s3://{BUCKET}/photographs-1024", f"s3://{BUCKET}/runs"
ROWS, GLO_EPOCHS, IMLE_EPOCHS, SAMPLES = 16, 3, 2, 100
CUT = (
    "generator.width=4",
    "generator.max_width=32",
    "generator.latent_dim=64",
    "loss.network=squeezenet",
    "loss.patch=256",
    f"glo.epochs={GLO_EPOCHS}",
    "glo.batch_size=4",
    f"sampler.epochs={IMLE_EPOCHS}",
    "sampler.batch_size=8",
    "evaluation.extractor=squeezenet",
    f"evaluation.samples={SAMPLES}",
    "evaluation.memory_gb=1",
    "engine.precision=fp32",
    "preview.images=4",
    "checkpoint.every_epochs=1",
    "data.threads=1",
    "data.cache_dir=shards",
    "cluster.workers=2",
    "cluster.gpus_per_worker=0",
    "cluster.cpus_per_worker=1",
)
# What the head's 16 GiB are for: some GiB for Ray, the dashboard and the driver, whatever the model; the rest is as
# good as the images that it would hold if it decoded some.
KUBERAY_HEAD, WITHOUT_A_MODEL = 16.0, 2.5  # GiB
WORKERS_HERE = WORKERS[:2]
SAVED_S = 7  # `glann mlflow` saves its database within five seconds


def head_limit() -> int:
    """Bytes of the head: (16 - 2.5) GiB, by how much less our G takes for an image than the recipe's, and 2.5 GiB.

    0.0625 GiB instead of 0.25 GiB: 2.5 + 13.5 / 4 = 5.875 GiB. Were the 100 samples decoded at once on the head, they
    would take 6.25 GiB besides those of Ray and the driver.
    """
    ours, recipe = (_bytes_of_an_image(load("celebahq-1024", list(cut))) for cut in (CUT, ()))
    return int((WITHOUT_A_MODEL + (KUBERAY_HEAD - WITHOUT_A_MODEL) * ours / recipe) * GIB)


def _bytes_of_an_image(config) -> int:
    return inference_bytes(generator_of(config), (config.generator.latent_dim,))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    if reason := no_network() or no_groups():
        pytest.skip(reason)
    kept = tmp_path_factory.mktemp("job-1024") / "logs"
    memory = {HEAD: head_limit(), MLFLOW: None} | dict.fromkeys(WORKERS_HERE)
    with Cluster("1024", workers=WORKERS_HERE, dashboard=True, mlflow=f"s3://{BUCKET}/mlflow", memory=memory) as up:
        try:
            yield up
        finally:
            shutil.copytree(up.logs, kept)
            for driver in up.desk.glob("ray/session_2*/logs/job-driver-*.log"):
                shutil.copy(driver, kept)


@pytest.fixture(scope="module")
def desk(cluster: Cluster) -> Desk:
    machine = Desk(cluster)
    machine.wait_for_dashboard()
    return machine


@pytest.fixture(scope="module")
def peaks(cluster: Cluster, desk: Desk):
    with Peaks(cluster.net.groups) as measured:
        yield measured
    print("\nmemory", *measured.table(), sep="\n  ")
    print("seconds", *(f"{seconds:7.1f}  {words}" for words, seconds in desk.took), sep="\n  ")


def checkpoints(cluster: Cluster, run: str) -> int:
    """How many complete checkpoints a run has in S3."""
    with cluster.store(f"{RUNS}/{run}/checkpoints") as store:
        return sum(key.endswith("manifest.json") for key in store.list())


def wait_for_job(desk: Desk, name: str, what, seconds: float = 900) -> None:
    """Poll; a job that ended before shows its log."""
    deadline, asked = time.monotonic() + seconds, time.monotonic()
    while not what():
        if time.monotonic() - asked > 45:
            asked = time.monotonic()
            state = desk.glann("jobs", "list")
            if not ("running" in state or "pending" in state) or time.monotonic() > deadline:
                pytest.fail(f"{state}\n{desk.glann('jobs', 'logs', name)[-3000:]}")
        time.sleep(0.5)


def lose_everything_but_s3(cluster: Cluster) -> None:
    """The head, MLflow's machine and the workers are gone, with their disks."""
    time.sleep(SAVED_S)
    for node in (HEAD, MLFLOW, *WORKERS_HERE):
        cluster.kill(node)
        for left in cluster.net.disk(node).iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def new_machines(cluster: Cluster, desk: Desk) -> None:
    """New ones take the places of those that are lost."""
    if not cluster.net.pids(MLFLOW):
        cluster.start_mlflow()
    for node in (HEAD, *WORKERS_HERE):
        if not cluster.net.pids(node):
            cluster.start(node)
    cluster.wait_for_mlflow()
    desk.wait_for_dashboard()


def test_from_photographs_to_a_served_model_though_the_head_is_lost(cluster, desk, peaks, tmp_path):
    began = time.monotonic()
    write_photographs(desk.folder / "pictures", ROWS, tmp_path)
    desk.glann("data", "pack", "pictures", DATA, "--resolution", str(SIDE))
    already = len(cluster.proxy.requests)

    keys = [word for key in KEYS for word in ("--env", key)]
    submit = ("submit", "celebahq-1024", *CUT, f"data.url={DATA}", f"checkpoint.url={RUNS}", "--name", NAME, *keys)
    said = desk.glann(*submit)
    assert f"submitted {NAME}.1" in said
    assert f"MLflow: {cluster.mlflow_url}" in said
    wait_for_job(desk, NAME, lambda: checkpoints(cluster, NAME) > 0)
    shown = desk.glann("jobs", "status", NAME)
    assert "stage 1 (GLO)  epoch" in shown, shown
    assert cluster.mlflow_url in shown, shown
    run_id = run_id_of(cluster)

    lose_everything_but_s3(cluster)
    lost = time.monotonic()
    new_machines(cluster, desk)
    said = desk.glann(*submit)
    back = time.monotonic() - lost
    assert f"submitted {NAME}.1" in said, "the new head knows of no former attempt"
    wait_for_job(desk, NAME, lambda: in_evaluation(cluster))
    busy = cpu_seconds(cluster)
    desk.glann("jobs", "watch", NAME, seconds=900)
    assert "finished" in desk.glann("jobs", "status", NAME)
    log = desk.glann("jobs", "logs", NAME)
    assert "resuming from the checkpoint at stage" in log, log[-3000:]
    assert run_id_of(cluster) == run_id, "another run in MLflow"

    addresses = {cluster.net.addresses[node] for node in WORKERS_HERE}
    readers = {
        request.client
        for request in cluster.proxy.requests[already:]
        if request.method == "GET"
        and request.path.startswith(f"/{BUCKET}/photographs-1024/")
        and ".tar" in request.path
    }
    assert readers <= addresses, "another machine than a worker read images: training and evaluation are theirs"
    assert set(busy) == set(WORKERS_HERE), "a worker took no part in the evaluation"

    text = desk.glann("jobs", "fetch", NAME)
    home = desk.folder / "runs" / NAME
    assert (home / "report.html").exists(), text
    desk.glann("registry", "register", run_id, "--as", "photographs")
    promoted = desk.glann("registry", "promote", "photographs", "--why", "the only one", "--samples", "8")
    assert "champion" in promoted, promoted

    lose_everything_but_s3(cluster)  # the registry is in S3
    cluster.start_mlflow()
    cluster.wait_for_mlflow()
    desk.glann("registry", "show", "photographs")
    served = desk.folder / "served.npy"
    desk.python("-c", SERVE, "models:/photographs@champion", str(cluster.net.home / served.name))
    images = np.load(served)
    assert images.shape == (2, SIDE, SIDE, 3)
    assert images.std() > 0, "a grey square"

    group = cluster.net.groups[HEAD]
    assert group.killed == 0, "the head was short of memory"
    assert peaks.of_group[HEAD] < group.limit
    print(f"\n{NAME}: {time.monotonic() - began:.0f} s in all; submitted again {back:.0f} s after the loss")


SERVE = """
import sys, mlflow.pyfunc, numpy, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
numpy.save(sys.argv[2], numpy.asarray(model.predict({"n": 2, "seed": 7})))
"""


def run_folder(cluster: Cluster) -> Path:
    return cluster.desk / "glann-jobs" / "runs" / NAME


def run_id_of(cluster: Cluster) -> str:
    """MLflow's id of the run."""
    return json.loads((run_folder(cluster) / "tracking.json").read_text())["run_id"]


def in_evaluation(cluster: Cluster) -> bool:
    """Whether the workers have begun to measure the trained model."""
    journal = run_folder(cluster) / "metrics.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return any(entry.get("event") == "phase" and entry["phase"] == "evaluation" for entry in entries)


def cpu_seconds(cluster: Cluster) -> dict[str, float]:
    """Seconds of a CPU that the training worker of each node takes in some seconds of the evaluation."""

    def ticks() -> dict[tuple[str, int], int]:
        found = {}
        for node in WORKERS_HERE:
            for pid in cluster.processes(node, "ray::RayTrainWorker"):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                found[node, pid] = int(fields[11]) + int(fields[12])
        return found

    before = ticks()
    time.sleep(3)
    after = ticks()
    return {key[0]: (after[key] - at) / 100 for key, at in before.items() if after.get(key, 0) > at + 10}
