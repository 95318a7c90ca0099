"""ray_cluster.yaml is one that Ray accepts, and its nodes end up with this project installed (checked offline)."""

from __future__ import annotations

from pathlib import Path

import glann
import pytest
import yaml
from glann.config import load

ROOT = Path(glann.__file__).parent


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
    assert "/home/ubuntu/.ray/auth_token" in cluster["file_mounts"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = [line for line in cluster[commands] if "ray start" in line]
        assert len(start) == 1
        assert "RAY_AUTH_MODE=token ~/glann-venv/bin/ray start" in start[0]
    assert "--dashboard-host=0.0.0.0" not in str(cluster)


def test_the_gpu_nodes_are_as_many_as_the_large_recipe_asks_for(cluster: dict):
    recipe = load("celebahq-1024").cluster
    gpu = cluster["available_node_types"]["gpu"]
    assert gpu["max_workers"] == recipe.workers
    assert cluster["max_workers"] >= recipe.workers
    assert gpu["node_config"]["InstanceType"].startswith(("g", "p"))
    assert gpu["node_config"]["IamInstanceProfile"], "without a role the nodes cannot reach S3"


def test_the_nodes_python_is_new_enough():
    """Ubuntu 24.04 has Python 3.12; 22.04's 3.10 could not install the project."""
    image = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]["gpu"]["node_config"]
    assert "ubuntu-24.04" in image["ImageId"]
