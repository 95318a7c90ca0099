"""Check, before a job is submitted, that the nodes of a cluster have the versions that this package needs."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ... import __version__
from ...errors import EnvironmentFault, UserError
from ..nodes.ray_private import server_version
from . import probe

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PROBE_TIMEOUT_S = 150.0
POLL_S = 0.3
PROBE = "glann-probe-"
OLD_S = 60.0
REMEDY = "install glann's dependencies there (`pip install -c constraints.txt .`) or use its image (deploy/Dockerfile)"


def needed() -> dict[str, SpecifierSet]:
    """Allowed versions of Python and of every declared dependency, by distribution name."""
    declared = metadata.metadata("glann")
    requirements = [Requirement(text) for text in metadata.requires("glann") or []]
    wanted = [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
    return {"python": SpecifierSet(declared["Requires-Python"])} | {need.name: need.specifier for need in wanted}


def misfits(found: dict[str, dict[str, str | None]], allowed: dict[str, SpecifierSet]) -> list[str]:
    """Describe each missing or unsuitable version in a phrase, with its nodes.

    Args:
        found: versions by distribution, by node.
    """
    nodes_by_fault: dict[str, list[str]] = {}
    here = probe.versions([name for name in allowed if name != "python"])
    for node, versions in found.items():
        for name, version in versions.items():
            if version is None or not allowed[name].contains(version, prereleases=True):
                has = f"{name} {version}" if version else f"no {name}"
                fault = f"{has} (needed: {allowed[name]}; here: {here[name]})"
                nodes_by_fault.setdefault(fault, []).append(node)
    return [f"{fault} on {_listed(nodes)}" for fault, nodes in nodes_by_fault.items()]


def _listed(nodes: list[str]) -> str:
    return ", ".join(sorted(nodes)[:3]) + (f" and {len(nodes) - 3} more nodes" if len(nodes) > 3 else "")


class Found(NamedTuple):
    """What the probe found: versions by distribution, by node; and the head's MLflow server, empty if it has none."""

    versions: dict[str, dict[str, str | None]]
    tracking: str


def refuse_misfit(client: JobSubmissionClient, address: str) -> Found:
    """What is on every node, if its versions are suitable.

    Raises:
        UserError: they are not; names the versions there, here and needed, and the remedy.
        EnvironmentFault: the probe got no answer.
    """
    allowed = needed()
    _refuse(misfits({"the head": {"ray": server_version(client)}}, allowed), address)
    found = run_probe(client, [name for name in allowed if name != "python"])
    _refuse(misfits(found.versions, allowed), address)
    return found


def _refuse(faults: list[str], address: str) -> None:
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{address} does not fit glann {__version__}: {'; '.join(faults[:3])}{more}; {REMEDY}")


def run_probe(client: JobSubmissionClient, names: list[str]) -> Found:
    """Run the probe as a short job.

    The job stays in Ray's list until the next probe: if it is deleted right after its end, Ray's monitor, which has
    not seen that end yet, lists it again as failed.
    """
    sweep(client)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "probe"
        folder.mkdir()
        shutil.copyfile(str(probe.__file__), folder / "probe.py")
        job = client.submit_job(
            entrypoint=" ".join(["exec python3 probe.py", *names]),
            submission_id=f"{PROBE}{uuid.uuid4().hex[:8]}",
            runtime_env={"working_dir": str(folder)},
        )
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    while not (info := client.get_job_info(job)).status.is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise EnvironmentFault(
                f"the head ran no version probe within {PROBE_TIMEOUT_S:.0f} s; see `ray status` and its dashboard"
            )
        time.sleep(POLL_S)
    log = client.get_job_logs(job)
    for line in (lines := log.splitlines()):
        if line.startswith(probe.MARK):
            servers = [other.removeprefix(probe.TRACKING) for other in lines if other.startswith(probe.TRACKING)]
            return Found(json.loads(line.removeprefix(probe.MARK)), (servers or [""])[-1].strip())
    said = [line.strip() for line in (log or info.message or "").splitlines() if line.strip()]
    raise EnvironmentFault(
        f"the version probe failed on the head: {said[-1][:200] if said else 'no answer'}; "
        "`ray start` there needs the python3 that has glann's dependencies first on its PATH"
    )


def sweep(client: JobSubmissionClient) -> None:
    """Remove earlier probes from the cluster's list of jobs."""
    for job in client.list_jobs():
        over = job.status.is_terminal() and (job.end_time or 0) / 1000 < time.time() - OLD_S
        if over and (job.submission_id or "").startswith(PROBE):
            client.delete_job(job.submission_id or "")
