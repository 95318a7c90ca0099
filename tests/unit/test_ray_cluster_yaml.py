"""ray_cluster.yaml is one that Ray accepts, and its nodes end up with this project installed (checked offline)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import glann
import pytest
import yaml
from glann.config.run import load

ROOT = Path(glann.__file__).parent
SPOT, ON_DEMAND = "gpu_spot", "gpu_on_demand"


@pytest.fixture(scope="module")
def cluster() -> dict:
    """The file as `ray up` would complete and check it before it calls AWS."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    validate_config(prepared)
    return prepared


def test_every_node_installs_this_project_with_its_pins(cluster: dict):
    assert cluster["file_mounts"]["/home/ubuntu/glann"] == "."
    for commands in ("head_setup_commands", "worker_setup_commands"):
        install = [line for line in cluster[commands] if "pip install" in line and "-e ~/glann" in line]
        assert install, f"{commands} do not install the project"
        assert "-c ~/glann/constraints.txt" in install[0]
    assert {".venv/", "runs/", "data/"} <= set(cluster["rsync_exclude"])


def test_all_nodes_start_ray_from_that_installation_with_a_token(cluster: dict):
    """And jobs run in it: their python3 is the first on the PATH of `ray start`."""
    assert "/home/ubuntu/.ray/auth_token" in cluster["file_mounts"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = [line for line in cluster[commands] if "ray start" in line]
        assert len(start) == 1
        assert "PATH=$HOME/glann-venv/bin:$PATH RAY_AUTH_MODE=token ray start" in start[0]
    assert "--dashboard-host=0.0.0.0" not in str(cluster)


def test_a_spot_machine_waits_for_its_notice_with_a_token(cluster: dict):
    [watch] = [line for line in cluster["worker_start_ray_commands"] if "glann drain --on-spot-notice" in line]
    assert cluster["worker_start_ray_commands"].index(watch) > 1, "there is no node to drain before `ray start`"
    assert "RAY_AUTH_MODE=token RAY_ADDRESS=$RAY_HEAD_IP:6379" in watch
    assert watch.endswith("&")
    assert subprocess.run(["bash", "-n", "-c", f"({watch})"]).returncode == 0


def test_mlflow_serves_the_head_alone_and_keeps_its_data_in_s3(cluster: dict):
    commands = cluster["head_start_ray_commands"]
    [serve] = [line for line in commands if "glann mlflow" in line]
    [start] = [line for line in commands if "ray start" in line]
    assert "glann-venv/bin/glann mlflow s3://BUCKET/mlflow >" in serve, "with the defaults: 127.0.0.1:5000"
    assert "export MLFLOW_TRACKING_URI=http://127.0.0.1:5000;" in start, "jobs inherit it"
    assert serve.endswith("&")
    assert subprocess.run(["bash", "-n", "-c", f"({serve})"]).returncode == 0
    assert "glann-mlflow/" in cluster["rsync_exclude"], "a working file of this machine is not copied to the nodes"


@pytest.mark.parametrize(("log", "shown"), [("error: no bucket can be called BUCKET\n", True), ("", False)])
def test_ray_up_ends_when_mlflow_answers_and_shows_why_it_does_not(
    cluster: dict, tmp_path: Path, log: str, shown: bool
):
    wait = cluster["head_start_ray_commands"][-1]
    (tmp_path / "mlflow.log").write_text(log)
    (tmp_path / "curl").write_text(f"#!/bin/sh\nexit {int(shown)}\n")
    (tmp_path / "curl").chmod(0o755)
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", wait], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, log), "a cluster without MLflow still starts"


def test_a_new_mlflow_waits_for_the_old_one_to_save(cluster: dict):
    """And neither pattern matches the shell that starts it."""
    [serve] = [line for line in cluster["head_start_ray_commands"] if "glann mlflow" in line]
    end, wait = re.findall(r'p(?:kill|grep) -f "(.*?)"', serve)
    assert end == wait
    assert re.search(end, "/home/ubuntu/glann-venv/bin/python3 /home/ubuntu/glann-venv/bin/glann mlflow s3://b/mlflow")
    for shell in (f"bash --login -c -i true && ({serve})", f"bash -c {serve}", "timeout 60 sh -c 'while pgrep'"):
        assert not re.search(end, shell)


def test_a_new_watcher_replaces_the_old_one_and_not_its_own_shell(cluster: dict):
    [watch] = [line for line in cluster["worker_start_ray_commands"] if "glann drain --on-spot-notice" in line]
    pattern = re.search(r'pkill -f "(.*?)"', watch)[1]
    for name in ("leave", "drain"):
        running = f"/home/ubuntu/glann-venv/bin/python3 /home/ubuntu/glann-venv/bin/glann {name} --on-spot-notice"
        assert re.search(pattern, running), f"glann {name} of an earlier `ray up` keeps running"
    for shell in (f"bash --login -c -i true && ({watch})", f"bash -c {watch}"):
        assert not re.search(pattern, shell), "it kills the shell that starts the new one"


def test_both_gpu_types_are_as_many_as_the_large_recipe_asks_for(cluster: dict):
    recipe = load("celebahq-1024").cluster
    assert cluster["max_workers"] >= 8
    for name in (SPOT, ON_DEMAND):
        gpu = cluster["available_node_types"][name]
        assert gpu["max_workers"] == 8
        assert gpu["node_config"]["InstanceType"] == "g5.4xlarge", "16 vCPU"
        assert recipe.cpus_per_worker <= 16
        assert gpu["node_config"]["IamInstanceProfile"], "without a role the nodes cannot reach S3"
    markets = [
        cluster["available_node_types"][name]["node_config"].get("InstanceMarketOptions") for name in (SPOT, ON_DEMAND)
    ]
    assert markets == [{"MarketType": "spot"}, None]


def test_no_gpu_is_paid_for_that_no_job_uses(cluster: dict):
    for name, node in cluster["available_node_types"].items():
        assert node["min_workers"] == 0, f"{name} would never be shut down"
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}, "workers belong on GPU nodes"


def test_a_job_is_given_spot_machines_and_others_when_there_are_none(cluster: dict):
    """Asked of the scheduler that `ray up` starts, with what EC2 would say that the machines have."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    types = {}
    for name, node in cluster["available_node_types"].items():
        resources = {"CPU": 16, "GPU": 1} if name in (SPOT, ON_DEMAND) else node["resources"]
        limits = {"min_worker_nodes": node["min_workers"], "max_worker_nodes": node["max_workers"]}
        types[name] = NodeTypeConfig(name, **limits, resources=resources, priority=node.get("priority", 0))
    recipe = load("celebahq-1024").cluster
    worker = ResourceRequestUtil.make({"CPU": recipe.cpus_per_worker, "GPU": recipe.gpus_per_worker})

    def started(**availability: float) -> dict[str, int]:
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=cluster["max_workers"] + 1,
            gang_resource_requests=[GangResourceRequest(requests=[worker] * 8)],
            recoverable_resource_availabilities=availability,
        )
        launched = ResourceDemandScheduler(event_logger=None).schedule(request).to_launch
        return {launch.instance_type: launch.count for launch in launched}

    assert started() == {SPOT: 8}
    assert started(**{SPOT: 0.0}) == {ON_DEMAND: 8}, "after EC2 had no spot machine"


def test_the_nodes_python_is_new_enough():
    """Ubuntu 24.04 has Python 3.12; 22.04's 3.10 could not install the project."""
    types = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    assert all("ubuntu-24.04" in node["node_config"]["ImageId"] for node in types.values())
