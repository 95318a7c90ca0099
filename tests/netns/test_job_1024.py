"""The job this product exists for, small: photographs of 1024 px, from files to a model that is served.

Everything is as on a real cluster: a user's machine, S3, MLflow by `glann mlflow`, Ray's job server, two worker nodes,
and a head with the memory of our KubeRay file, which is lost in the middle of the training together with all nodes and
MLflow's machine; and a study of the same job, with the same loss. Width, rows and epochs are cut, and the loss network
is SqueezeNet, which sees patches. Wall times and peaks of memory are printed.
"""

from __future__ import annotations

import http.client
import json
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from cgroups import GIB, Peaks
from cgroups import why_not as no_groups
from cluster_nodes import BUCKET, HEAD, MLFLOW, WORKERS, Cluster
from desk import DESK, KEYS, Desk
from glann.config.run import load
from glann.models.cost import inference_bytes
from glann.models.generators import generator_of
from netns import wait_until
from netns import why_not as no_network
from photographs import SIDE, write_photographs

pytestmark = [pytest.mark.netns, pytest.mark.matrix, pytest.mark.network, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
NAME, DATA, RUNS = "photographs-1024", f"s3://{BUCKET}/photographs-1024", f"s3://{BUCKET}/runs"
STUDY = "rates-1024"
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
SERVED_AT = 5001
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
    with served(desk, "models:/photographs@champion") as predict:
        images = predict({"n": 1, "seed": 7})
    assert images.shape == (1, SIDE, SIDE, 3)
    assert images.std() > 0, "a grey square"

    group = cluster.net.groups[HEAD]
    assert group.killed == 0, "the head was short of memory"
    assert peaks.of_group[HEAD] < group.limit
    print(f"\n{NAME}: {time.monotonic() - began:.0f} s in all; submitted again {back:.0f} s after the loss")


def test_a_study_at_1024_px_outlives_its_head(cluster, desk, peaks, tmp_path):
    """Two trials of the same job, on a worker node each."""
    new_machines(cluster, desk)
    if not (desk.folder / "pictures").exists():
        write_photographs(desk.folder / "pictures", ROWS, tmp_path)
        desk.glann("data", "pack", "pictures", DATA, "--resolution", str(SIDE))
    cut = dict(word.split("=") for word in CUT) | {"data.max_rows": "12", "glo.epochs": "4", "sampler.epochs": "1"}
    cut |= {"evaluation.samples": "8", "cluster.workers": "1"}
    tree = {"name": STUDY, "recipe": "celebahq-1024", "overrides": {key: yaml.safe_load(cut[key]) for key in cut}}
    tree |= {"space": {"glo.generator_lr": {"log_uniform": [0.0003, 0.003]}}, "metric": "fd_squeezenet"}
    tree |= {"search": {"kind": "random"}, "scheduler": {"kind": "none"}, "budget": {"trials": 2}}
    (desk.folder / "study.yaml").write_text(yaml.safe_dump(tree))
    keys = [word for key in KEYS for word in ("--env", key)]
    submit = ("submit", "study.yaml", f"data.url={DATA}", f"checkpoint.url={RUNS}", *keys)
    assert f"submitted {STUDY}.1" in desk.glann(*submit)
    wait_for_job(desk, STUDY, lambda: any(checkpoints(cluster, f"{STUDY}-{number:04d}") for number in range(2)))
    lose_everything_but_s3(cluster)
    new_machines(cluster, desk)
    assert f"submitted {STUDY}.1" in desk.glann(*submit)
    desk.glann("jobs", "watch", STUDY, seconds=900)
    log = desk.glann("jobs", "logs", STUDY)
    assert f"resuming with the copy of the study folder beside {RUNS}/{STUDY}/checkpoints" in log, log[-3000:]
    desk.glann("jobs", "fetch", STUDY)
    home = desk.folder / "studies" / STUDY
    assert (home / "report.html").exists()
    assert len(list((home / "trials").glob("*/model/model.json"))) == 1, "of its best trial"
    assert cluster.net.groups[HEAD].killed == 0, "the head was short of memory"


@contextmanager
def served(desk: Desk, model: str):
    """A model behind HTTP on the desk, by MLflow's own model server; yields what sends it a request."""
    where = ("--host", "127.0.0.1", "--port", str(SERVED_AT))
    began, log = time.monotonic(), desk.folder / "served.log"
    with open(log, "wb") as file:
        words = ("-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local", *where)
        server = desk.cluster.net.start(DESK, sys.executable, *words, env=desk.env, stdout=file, stderr=file)

    def answer(method: str, path: str, body: str | None = None) -> bytes:
        with desk.cluster.net.inside(DESK):
            connection = http.client.HTTPConnection("127.0.0.1", SERVED_AT, timeout=120)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        assert response.status == 200, text[:2000]
        return text

    def ready() -> bool:
        assert server.poll() is None, log.read_text()[-3000:]
        with suppress(OSError):
            answer("GET", "/ping")
            return True
        return False

    def predict(inputs: dict) -> np.ndarray:
        return np.array(json.loads(answer("POST", "/invocations", json.dumps({"inputs": inputs})))["predictions"])

    try:
        wait_until(ready, 180, f"the model is not served; see {log}", 0.5)
        desk.took.append(("mlflow models serve", time.monotonic() - began))
        yield predict
    finally:
        desk.cluster.net.end_processes(DESK)


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
