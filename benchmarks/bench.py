"""All ratios on this machine's CPU in one table: at most 15 minutes on two cores. `make bench` runs it.

    python benchmarks/bench.py [SUITE ...]

Each suite has a process of its own, and both sides of a row are measured in it, in turns. Rows end in `meets` or
`falls short`, which the last line counts; the exit status is 0 either way. What needs a GPU is in `gpu.py`.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context

from harness import Row, machine, not_measured, report

SUITES = {
    "glo": ("training", "stage_one"),
    "imle": ("training", "stage_two"),
    "search": ("neighbours", "rows"),
    "latents": ("latents", "rows"),
    "perceptual": ("perceptual", "rows"),
    "data": ("data", "rows"),
    "start-up": ("start_up", "rows"),
}


def measure(suite: str) -> list[Row]:
    """The rows of a suite; called in a process of its own."""
    module, function = SUITES[suite]
    rows: list[Row] = getattr(import_module(module), function)()
    return rows


def apart(suite: str) -> list[Row]:
    """The rows of a suite, measured in a new process; one that says why if that fails."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, suite).result()
        except (Exception, BrokenProcessPool) as error:
            return [not_measured(suite, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would be counted as CPU time
    here, rows = machine(), []
    try:
        for suite in options.suites or SUITES:
            began = time.monotonic()
            rows += apart(suite)
            print(f"{suite}: {time.monotonic() - began:.0f} s", flush=True)
    finally:  # also when it is interrupted: a suite takes minutes
        report(rows, here)


if __name__ == "__main__":
    main()
