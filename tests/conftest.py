"""How the tests share a machine when several processes run them, as in `make test`.

Tests that start clusters, or train by the command, run one after the other in one process: they measure times, and fill
the cores by themselves. Those of tests/dist share one Ray, and so a process. The files of all others are dealt out.
"""

from __future__ import annotations

import os

import pytest

ONE_AFTER_THE_OTHER = {"dist": "dist", "e2e": "machine", "gpu": "machine", "netns": "machine"}  # folders of tests/

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # read when torch is imported; with more, processes wait for one another


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A unit of work is a file, or all files of these folders, which begin first: they take the longest."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next(
                (ONE_AFTER_THE_OTHER[part] for part in file.split("/")[:2] if part in ONE_AFTER_THE_OTHER), file
            )

    config.option.loadscopereorder = False  # in the order of collection, which has these folders in front
    return Scheduling(config, log)
