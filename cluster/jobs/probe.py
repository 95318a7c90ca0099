"""Stand-alone script that reports the versions of Python and of packages on every node of a cluster, and its MLflow.

`glann submit` ships this one file and runs `python3 probe.py torch deepspeed ...` on the head. It must run on an old
Python without most of the packages, so it imports nothing but Ray, and that only when needed.
"""

import json
import logging
import os
import re
import sys

MARK, TRACKING = "VERSIONS ", "TRACKING "
TIMEOUT_S = 90


def versions(names):
    """Versions by distribution name, None if not installed, and the version of Python."""
    import platform
    from importlib import metadata

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def nodes(names):
    """Versions by node address, for all living nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    look = ray.remote(num_cpus=0)(versions)
    pending = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            pending[node["NodeManagerAddress"]] = look.options(scheduling_strategy=here).remote(names)
    answers = ray.get(list(pending.values()), timeout=TIMEOUT_S)  # for all nodes together
    return {address: answers[at] for at, address in enumerate(pending)}


def tracking():
    """The MLflow server in the environment of jobs on this head, without a password; empty if there is none."""
    return re.sub(r"//[^/@]*@", "//***@", os.environ.get("MLFLOW_TRACKING_URI", ""))


if __name__ == "__main__":
    print(MARK + json.dumps(nodes(sys.argv[1:])), flush=True)
    print(TRACKING + tracking(), flush=True)
