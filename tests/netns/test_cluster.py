"""The whole job on real nodes: it ends well, codes live beside their workers, images are read where they are owned."""

from __future__ import annotations

import json
import math
from collections import defaultdict

import numpy as np
import pytest
from cluster_job import BATCH, GLO_EPOCHS, IMLE_EPOCHS, ROWS
from cluster_nodes import BUCKET, HEAD, MLFLOW, S3, WORKERS

# The limit is for a machine that does other things too.
pytestmark = [pytest.mark.netns, pytest.mark.timeout(1200)]


def test_the_job_trains_across_the_nodes(undisturbed):
    end = undisturbed.end
    assert end.state["position"]["stage"] == "done"
    assert (end.visits_N == GLO_EPOCHS).all()
    assert end.visits_N.shape == (ROWS,)
    steps = GLO_EPOCHS * math.ceil(ROWS / BATCH)
    assert end.state["updates"]["generator"] == steps
    losses = [entry["loss"] for entry in undisturbed.job.epochs()]
    assert len(losses) == GLO_EPOCHS + IMLE_EPOCHS
    assert losses[GLO_EPOCHS - 1] < 0.6 * losses[0]  # it was 0.54 of it
    assert (undisturbed.path / "report.html").exists()


def test_latents_live_on_their_workers_nodes_and_stay_there(undisturbed, cluster):
    nodes = [shard["node"] for shard in undisturbed.shards]
    assert len(nodes) == 2
    assert len(set(nodes)) == 2, "two workers on nodes of one CPU share no node"
    assert set(nodes) <= set(WORKERS), "the head has no CPU for training"
    assert sorted(nodes) == sorted(trainer["node"] for trainer in undisturbed.trainers)
    assert {(shard["node"], shard["pid"]) for shard in undisturbed.shards} == undisturbed.late, (
        "the actors moved, or were made anew"
    )


def test_images_are_read_on_the_node_that_owns_their_rows(undisturbed, cluster):
    with cluster.net.inside(S3):
        header = json.loads(cluster.s3_client().get_object(Bucket=BUCKET, Key="digits/index.json")["Body"].read())
    first_S = np.cumsum([0, *[shard["rows"] for shard in header["shards"]]])
    shards_of_rank = [set(), set()]
    for number, shard in enumerate(header["shards"]):
        for rank, rows in enumerate((range(ROWS // 2), range(ROWS // 2, ROWS))):
            if first_S[number] < rows.stop and rows.start < first_S[number + 1]:
                shards_of_rank[rank].add(shard["file"])
    assert len(shards_of_rank[0] & shards_of_rank[1]) <= 1  # the one that holds the border
    read = defaultdict(set)
    for request in undisturbed.requests:
        file = request.path.removeprefix(f"/{BUCKET}/digits/")
        if request.method == "GET" and file in {shard["file"] for shard in header["shards"]}:
            read[request.client].add(file)
    read.pop(cluster.net.addresses[HEAD], None)  # the driver measures the finished model against all images
    nodes = [cluster.net.addresses[shard["node"]] for shard in undisturbed.shards]
    assert set(read) == set(nodes)
    assert [read[nodes[0]], read[nodes[1]]] in (shards_of_rank, shards_of_rank[::-1])


def test_nothing_is_shared_between_the_nodes_but_the_network(undisturbed, cluster):
    assert (cluster.net.disk(HEAD) / "runs").exists()
    for worker in WORKERS:
        assert not (cluster.net.disk(worker) / "runs").exists()


def test_the_tracking_server_has_the_metrics(undisturbed, cluster):
    from mlflow import MlflowClient

    run_id = undisturbed.job.run_id
    with cluster.net.inside(MLFLOW):
        client = MlflowClient(cluster.mlflow_url)
        assert client.get_run(run_id).info.status == "FINISHED"
        history = client.get_metric_history(run_id, "glo/loss")
    told = {entry["step"]: entry["loss"] for entry in undisturbed.job.epochs() if entry["stage"] == "glo"}
    assert {metric.step: metric.value for metric in history} == pytest.approx(told)
