"""The threads that OpenMP keeps for torch, of which a process has one a core."""

from __future__ import annotations

import os

WAIT_POLICY = "OMP_WAIT_POLICY"


def let_threads_sleep() -> str:
    """Have threads that wait for work sleep, unless the environment says otherwise; returns the policy.

    By default they spin, which takes the cores from the threads that work where other processes run as well: measuring
    an image took 36 to 48 ms of processor time instead of 4. OpenMP reads the variable once, when torch is imported.
    """
    return os.environ.setdefault(WAIT_POLICY, "passive")
