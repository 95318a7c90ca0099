"""Threads that wait for work sleep in every process of ours, unless the user has chosen otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from glann.cluster.nodes.ray import is_noise, set_ray_env
from glann.cluster.nodes.threads import let_threads_sleep

COMMAND = """
from glann.cli.main import main
try:
    main(["--version"])
except SystemExit:
    import torch
"""


def test_a_command_sets_it_before_torch_is_imported():
    """OpenMP reads it when it is loaded and not again, so later would be without effect."""
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | {"OMP_DISPLAY_ENV": "true"}
    done = subprocess.run([sys.executable, "-c", COMMAND], env=env, capture_output=True, text=True, timeout=120)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_a_local_ray_inherits_it_and_workers_elsewhere_are_given_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    before = dict(os.environ)
    set_ray_env()
    assert os.environ["OMP_WAIT_POLICY"] == let_threads_sleep() == "passive"
    os.environ.clear()
    os.environ.update(before | {"OMP_WAIT_POLICY": "active"})
    set_ray_env()
    assert let_threads_sleep() == "active"
    os.environ.clear()
    os.environ.update(before)


def test_rays_lines_about_processes_are_hidden_and_no_others():
    many = "WARNING: 8 PYTHON worker processes have been started on node: 1fa2 with address: 10.0.0.1, which is 4x"
    assert is_noise(many)
    assert is_noise("A worker died or was killed while executing a task by an unexpected system error.")
    assert not is_noise("WARNING: the object store is full")
