"""One local Ray for the tests of this folder, and groups of processes that talk through torch.distributed."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


FOLDER = Path(__file__).parent
started = contextlib.ExitStack()  # ends with the tests of this folder


@pytest.fixture(scope="session")
def local_ray():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    started.callback(os.environ.pop, "RAY_AUTH_MODE")
    started.callback(ray.shutdown)
    return ray


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Tests of other folders, in the same process, start Rays of their own, or must find none."""
    if nextitem is None or FOLDER not in nextitem.path.parents:
        started.close()


class Member:
    """One member of a gloo group, in a process of its own."""

    def __init__(self, rank: int, world: int, port: int):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", address, rank=rank, world_size=world, timeout=timedelta(seconds=60))

    def run(self, function, *arguments):
        return function(*arguments)


@pytest.fixture(scope="session")
def gloo_group(local_ray):
    """`with gloo_group(world) as members`: Ray actors whose `run` calls a function inside the group."""

    @contextlib.contextmanager
    def group(world: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        actor = local_ray.remote(Member).options(num_cpus=0)
        members = [actor.remote(rank, world, port) for rank in range(world)]
        yield members
        for member in members:
            local_ray.kill(member)

    return group
