"""Private names of Ray: each one is there and does what it is used for, so an upgrade of Ray fails here first."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from glann.cluster.nodes import ray_private

# A head of its own, in a process of its own: it counts its nodes and actors, and one node is drained.
CLUSTER = """
import asyncio, json, os, sys, time, ray
import ray.dashboard.modules.job.common
from glann.cluster.nodes import ray_private

@ray.remote(num_cpus=0)
class Busy:
    def ready(self):
        return True

@ray.remote(num_cpus=0)
class Reserving:
    def reserve(self):
        return ray.util.placement_group([{"CPU": 1}]).wait(30)

    def path(self):
        return sys.path

options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init(address="local", job_config=ray_private.isolated_job(), **options)
actor = Busy.remote()
ray.get(actor.ready.remote())
context = ray.get_runtime_context()
head, node = context.gcs_address, context.get_node_id()
found = {
    "draining": ray_private.draining_nodes(),
    "alive": ray_private.is_node_alive(head, node),
    "open": ray_private.answers_without_token(head),
    "actors": [actor.class_name for actor in ray_private.actors_on_node(head, node)],
    "pids": [actor.pid for actor in ray_private.actors_on_node(head, node)],
    "elsewhere": ray_private.actors_on_node(head, "0" * 56),
}
reserving, ours = Reserving.remote(), ray.util.placement_group([{"CPU": 1}])
found["path"], found["reserved"] = ray.get([reserving.path.remote(), reserving.reserve.remote()])
found["refusal_of_head"] = ray_private.head_refusal(head)
found["abandoned"] = [len(ray_private.abandoned_reservations())]
ray.kill(reserving)
for _ in range(100):
    if abandoned := ray_private.abandoned_reservations():
        break
    time.sleep(0.1)
found["abandoned"].append(len(abandoned))
for group in abandoned:
    ray.util.remove_placement_group(group)
found["abandoned"].append(len(ray_private.abandoned_reservations()))
found["free"] = ray.util.placement_group([{"CPU": 1}]).wait(30)
os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"metadata": {"job_submission_id": "faces.1"}})
found["job"], found["metadata"] = ray_private.submitted_job(), []
gcs, jobs = ray._private.worker.global_worker.gcs_client, ray.dashboard.modules.job.common
for state in ("RUNNING", "SUCCEEDED"):
    info = jobs.JobInfo(status=jobs.JobStatus(state), entrypoint="sh", metadata={"glann.name": "faces"})
    asyncio.run(jobs.JobInfoStorageClient(gcs).put_info("faces.1", info))
    changed = ray_private.update_job_metadata(head, "faces.1", {"glann.progress": "half"})
    read = asyncio.run(jobs.JobInfoStorageClient(gcs).get_info("faces.1"))
    found["metadata"].append([changed, read.status.value, read.metadata])
found["metadata"].append(ray_private.update_job_metadata(head, "dogs.1", {}))
deadline = time.time() + 600
found["accepted"], found["refusal"] = ray_private.request_drain(head, node, "a test", deadline)
found["left_ms"] = ray_private.draining_nodes().get(node, 0) - 1000 * deadline
print("FOUND " + json.dumps(found))
"""


def test_nodes_actors_and_reservations_of_a_real_cluster(tmp_path: Path):
    script = tmp_path / "scripts" / "driver.py"
    script.parent.mkdir()
    script.write_text(CLUSTER)
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 40}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["draining"] == {}
    assert found["alive"] is True
    assert found["open"] is False, "the head has a token"
    assert found["actors"] == ["Busy"]
    assert found["pids"][0] > 1
    assert found["elsewhere"] == []
    assert not {str(tmp_path), str(script.parent), "", "."} & {*found["path"]}, "a folder of the driver"
    assert found["refusal_of_head"] is None
    assert found["reserved"] is True
    assert found["job"] == "faces.1"
    assert found["metadata"] == [
        [True, "RUNNING", {"glann.name": "faces", "glann.progress": "half"}],
        [False, "SUCCEEDED", {"glann.name": "faces"}],
        False,
    ], "a job that has ended is not changed, nor one that was never there"
    assert found["abandoned"] == [0, 1, 0], "not while its creator lives, not what the driver reserved, not twice"
    assert found["free"] is True
    assert (found["accepted"], found["refusal"]) == (True, "")
    assert abs(found["left_ms"]) < 2


def test_ray_train_still_leaves_an_actor_of_that_name():
    module = importlib.import_module("ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator")
    assert inspect.isclass(getattr(module, ray_private.COORDINATOR_ACTOR))


def test_the_title_of_a_process_can_be_set():
    """In a process of its own: this one keeps its title."""
    code = (
        "import ray._raylet as raylet; from glann.cluster.nodes.ray_private import set_process_title;"
        "set_process_title('another'); print(raylet.getproctitle())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "another", done.stderr


def test_hidden_lines_are_not_printed_and_others_are(monkeypatch: pytest.MonkeyPatch):
    from ray._private import worker

    printed: list[list[str]] = []
    assert list(inspect.signature(worker.print_to_stdstream).parameters) == ["data", "ignore_prefix"]
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages), "printed by another function"
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: printed.append(data["lines"]))
    ray_private.hide_worker_output(lambda line: line.startswith("secret"))
    worker.print_to_stdstream({"lines": ["a line"]}, ignore_prefix=False)
    worker.print_to_stdstream({"lines": ["secret: 1"]}, ignore_prefix=False)
    assert printed == [["a line"]]


@pytest.fixture
def requests_sent(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What Ray's job client sends, to a server that gives its version and nothing else."""
    from ray.dashboard.modules import dashboard_sdk

    sent: list[dict] = []

    def request(method: str, url: str, **options: object) -> SimpleNamespace:
        sent.append({"method": method, "url": url, **options})
        version = {"ray_version": "2.99.0", "ray_commit": "", "version": "4", "session_name": "s"}
        return SimpleNamespace(status_code=200, text="", json=lambda: version, raise_for_status=lambda: None)

    monkeypatch.setattr(dashboard_sdk.requests, "request", request)
    return sent


def test_every_request_of_a_job_client_has_a_timeout_and_the_version_is_known(requests_sent: list[dict]):
    from ray.job_submission import JobSubmissionClient

    client = ray_private.with_timeout(JobSubmissionClient, 3.0, 7.0)("http://127.0.0.1:1")
    assert isinstance(client, JobSubmissionClient)
    assert client.get_version() == "4"
    assert len(requests_sent) >= 2
    assert {request["timeout"] for request in requests_sent} == {(3.0, 7.0)}
    assert ray_private.server_version(client) == "2.99.0"


def test_the_token_of_this_machine_is_used(monkeypatch: pytest.MonkeyPatch):
    """In a process of its own: Ray reads the token once."""
    code = (
        "import os; from glann.cluster.nodes.ray_private import enable_token_auth; enable_token_auth();"
        "print(os.environ.get('RAY_AUTH_MODE'))"
    )
    env = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"RAY_AUTH_TOKEN": "t" * 40},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "token", done.stderr


def test_the_loggers_that_are_quieted_are_rays():
    ray_private.quiet_job_client()
    for name, level in ray_private.DRIVER_LOGGERS.items():
        module = importlib.import_module(name)
        assert (getattr(module, "logger", None) or module.default_logger).name == name
        assert logging.getLogger(name).level == level
