"""A real Ray without token authentication is found by a call without a token; one with tokens passes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


DOCTOR = """
import sys
from glann.cluster.doctor.checks import ray_cluster
from glann.config.run import load
check = ray_cluster(load("digits", [f"cluster.address={sys.argv[1]}", "cluster.workers=1"]))
print("CHECK", check.ok, check.found)
"""


def test_a_cluster_that_takes_anyone_is_found_and_one_with_tokens_is_not():
    """Two real heads: the question is put to Ray itself, without a token. In a process of its own, as the command."""
    for mode, ok in (("disabled", False), ("token", True)):
        with real_head({"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "t" * 40}) as address:
            env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 40}
            command = [sys.executable, "-c", DOCTOR, address]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        [check] = [line for line in done.stdout.splitlines() if line.startswith("CHECK ")]
        assert check.startswith(f"CHECK {ok} "), check
        assert ("without a token" in check) != ok


def test_a_wrong_token_is_refused_before_ray_is_joined(tmp_path):
    """In processes of their own: Ray reads the token once. A head without tokens accepts any."""
    code = "import sys; from glann.cluster.nodes.address import require_head; require_head(sys.argv[1])"
    with real_head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 40}) as address:
        for env, said in (
            ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 40}, ""),
            ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 40}, "does not accept this process's token"),
            ({"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}, "does not accept this process's token: there is none"),
            ({"RAY_AUTH_MODE": "disabled"}, "does not accept this process's token"),
        ):
            command = [sys.executable, "-c", code, address]
            kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
            done = subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=60)
            assert (done.returncode == 0) == (not said), done.stderr
            assert said in done.stderr
