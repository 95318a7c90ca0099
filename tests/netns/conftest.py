"""A cluster of real nodes for the session, and the end of a job that nothing disturbed, to hold faults against.

The nodes are Ray nodes in network namespaces (`tests/support/cluster_nodes.py`, which also says how to bring a
cluster up by hand). Root and iproute2 are needed; elsewhere these tests are skipped.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cluster_faults import SEED, SHARD, TRAINER, Script
from cluster_job import End, Job, pack_digits
from cluster_nodes import WORKERS, Cluster
from netns import why_not


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory):
    """The cluster, with the data set packed into its S3. Logs are kept where pytest keeps its folders."""
    if reason := why_not():
        pytest.skip(reason)
    kept = tmp_path_factory.mktemp("cluster") / "logs"
    with Cluster() as cluster:
        try:
            pack_digits(cluster)
            yield cluster
        finally:
            shutil.copytree(cluster.logs, kept)


@pytest.fixture
def cluster(whole_cluster: Cluster):
    """The cluster with every node up and every link whole, whatever the test before did."""
    yield whole_cluster
    whole_cluster.repair()


STRUCK: list[Script] = []


@pytest.fixture
def strikes(cluster):
    """A script of strikes for a job, which is ended if the test fails; all are told at the end of the session."""
    begun: list[Script] = []

    def script(job: Job) -> Script:
        begun.append(Script(job))
        STRUCK.append(begun[-1])
        return begun[-1]

    yield script
    for each in begun:
        if each.job.process is not None and each.job.process.poll() is None:
            each.kill_driver()


def pytest_terminal_summary(terminalreporter):
    if STRUCK:
        terminalreporter.section(f"faults (GLANN_FAULT_SEED={SEED})")
        for script in STRUCK:
            for strike in script.strikes:
                terminalreporter.write_line(f"{script.job.name}: {strike}")


@pytest.fixture(scope="session")
def undisturbed(whole_cluster: Cluster) -> Undisturbed:
    """The job with two workers on three nodes, from beginning to end, and what was seen on the way."""
    return Undisturbed(whole_cluster)


class Undisturbed:
    """What a run without faults shows: `end`, `job`, where Ray had its actors, and where its shards ran later."""

    def __init__(self, cluster: Cluster) -> None:
        already = len(cluster.proxy.requests)
        self.job = Job(cluster, "undisturbed").start()
        self.job.wait_for_epoch("glo", 1)
        actors = cluster.actors()
        self.shards = [actor for actor in actors if actor["name"] == SHARD]
        self.trainers = [actor for actor in actors if actor["name"] == TRAINER]
        self.job.wait_for_epoch("imle", 1)
        # What runs on the nodes is seen at once; Ray would answer when the job has ended.
        self.late = {(node, pid) for node in WORKERS for pid in cluster.processes(node, f"ray::{SHARD}")}
        self.status = self.job.wait()
        self.requests = cluster.proxy.requests[already:]
        if self.status:
            pytest.fail(f"the undisturbed job ended with {self.status}:\n{self.job.said()[-3000:]}")
        self.end: End = self.job.end()

    @property
    def path(self) -> Path:
        return self.job.folder
