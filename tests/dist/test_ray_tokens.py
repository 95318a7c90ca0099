"""A real Ray without token authentication is found by a call without a token; one with tokens passes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from glann.cluster.doctor import checks as doctor
from glann.config.run import load

HEAD = """
import ray
print(ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False).address_info["gcs_address"])
import sys; sys.stdout.flush(); sys.stdin.read()
"""


@contextmanager
def real_head(env: dict[str, str]) -> Iterator[str]:
    """A Ray of another process, by its address; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD], env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "Ray did not start"
        yield address
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def test_a_cluster_that_takes_anyone_is_found_and_one_with_tokens_is_not(monkeypatch: pytest.MonkeyPatch):
    """Two real heads: the question is put to Ray itself, without a token."""
    for mode, ok in (("disabled", False), ("token", True)):
        env = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "t" * 40}
        with real_head(env) as address:
            monkeypatch.setenv("RAY_AUTH_MODE", "token")
            monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 40)
            check = doctor.ray_cluster(load("digits", [f"cluster.address={address}", "cluster.workers=1"]))
        assert check.ok == ok, check
        assert ("without a token" in check.found) != ok
