"""How the tests share a machine when several processes run them, as in `make test`.

Tests that start clusters, or train on several workers, run one after the other in one process: they measure times, and
fill the cores by themselves. The files of the other tests are dealt out to the rest.
"""

from __future__ import annotations

import os

import pytest

FILL_THE_MACHINE = ("dist", "e2e", "netns", "gpu")  # folders of tests/

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # read when torch is imported; with more, processes wait for one another


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A unit of work is a file, or all files of these folders. These begin first: they take the longest."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "the machine" if set(file.split("/")[:2]) & set(FILL_THE_MACHINE) else file

    config.option.loadscopereorder = False  # in the order of collection, which has these folders in front
    return Scheduling(config, log)
