"""Preflight checks of `glann doctor`, before hours of machine time are spent.

Every check results in one line: good, or bad with a remedy. A check changes nothing, except that the checkpoint store
is tested by writing and removing one object.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ...config.paths import expand
from ...config.run import Config
from ...datasets.assets.catalogue import cache_dir
from ...datasets.fit import held_out_of, require_fit
from ...datasets.index import Index
from ...datasets.left_out import counted
from ...errors import GlannError, UserError
from ...storage.base import MissingObject
from ...storage.open import local_folder, open_store
from ...storage.proxy import proxy_of
from ...storage.s3_address import endpoint_of
from ..checkpoints.lease import enforces_conditions
from ..nodes.address import listens, ray_address, require_head
from ..nodes.ray import require_home, require_session_folder
from . import security
from .check import Check

MAIN_PACKAGES = ("torch", "ray", "deepspeed", "mlflow")  # a line each; the others share one
RAY_TIMEOUT_S = 60.0
GIB = 1 << 30
MIN_DISK_GIB = 5
MIN_SHM_GIB = 1
PROBE_KEY = "glann-doctor-probe"

# In a process of its own, because a failed connection can end the process.
_RAY_PROBE = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("RESOURCES " + json.dumps(ray.cluster_resources()))
from glann.cluster.nodes.ray_private import answers_without_token
if answers_without_token(ray.get_runtime_context().gcs_address):
    print("OPEN")
"""


def checks(config: Config | None = None) -> Iterator[Check]:
    """Run all checks in order; with a configuration also those of its data and cluster.

    That of MLflow is in `tracking.doctor`.
    """
    yield from package_checks()
    yield accelerators(config)
    yield security.auth_mode(config)
    yield ray_cluster(config)
    yield from disk_checks(config)
    yield shared_memory()
    if config is not None:
        yield from proxies(config)
        if transport := security.storage_transport(config):
            yield transport
        yield data_set(config)
        yield checkpoints(config)


def package_checks() -> Iterator[Check]:
    """Compare installed versions with the ranges that glann declares."""
    try:
        declared = metadata.metadata("glann")
    except metadata.PackageNotFoundError:
        yield Check(
            "packages", False, "glann is not installed here as a package", "pip install -c constraints.txt -e ."
        )
        return
    python = platform.python_version()
    yield _in_range("python", python, SpecifierSet(declared["Requires-Python"]), "use a Python in that range")
    requirements = [Requirement(text) for text in metadata.requires("glann") or []]
    needed = [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
    others = []
    for need in needed:
        check = _package(need)
        if need.name in MAIN_PACKAGES or not check.ok:
            yield check
        else:
            others.append(need.name)
    yield Check("packages", True, f"{len(others)} others in range")


def _package(need: Requirement) -> Check:
    remedy = "pip install -c constraints.txt -e ."
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Check(need.name, False, "not installed", remedy)
    return _in_range(need.name, version, need.specifier, remedy)


def _in_range(name: str, version: str, allowed: SpecifierSet, remedy: str) -> Check:
    if allowed.contains(version, prereleases=True):
        return Check(name, True, version)
    return Check(name, False, f"{version} is outside {allowed}", remedy)


def accelerators(config: Config | None) -> Check:
    """List the GPUs of this machine, and check that a local run has as many as it needs."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"no GPU; {os.cpu_count()} CPU cores, torch {torch.__version__}"
    if count:
        properties = [torch.cuda.get_device_properties(device) for device in range(count)]
        found = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in properties)
    if config is None or ray_address(config):
        return Check("accelerators", True, found)
    needed = config.cluster.min_workers * config.cluster.gpus_per_worker
    if needed > count:
        return Check(
            "accelerators",
            False,
            f"{found}; {config.name} needs {needed:g} GPUs on this machine",
            "join a cluster with cluster.address=…, or set cluster.gpus_per_worker=0 to train on CPUs",
        )
    return Check("accelerators", True, found)


def ray_cluster(config: Config | None) -> Check:
    """Check that the cluster answers, requires a token and has the resources that the run needs."""
    address = ray_address(config)
    try:
        require_home()
        if address is None:
            require_session_folder()
            return Check("ray", True, "a local Ray will be started")
        require_head(address)
    except GlannError as error:
        found, _, remedy = str(error).partition("; ")
        return Check("ray", False, found, remedy)
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", _RAY_PROBE, address], capture_output=True, text=True, timeout=RAY_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Check("ray", False, f"{address} did not answer in {RAY_TIMEOUT_S:.0f} s", "see `ray status` on the head")
    answer = [line for line in result.stdout.splitlines() if line.startswith("RESOURCES ")]
    if result.returncode or not answer:
        reason = (result.stderr.strip().splitlines() or ["no answer"])[-1]
        return Check("ray", False, f"{address}: {reason}", "compare Ray versions and RAY_AUTH_MODE with the head's")
    if "OPEN" in result.stdout.splitlines():
        found = f"{address} accepts calls without a token: anyone who reaches it can run code there"
        return Check("ray", False, found, security.RAY_REMEDY)
    return _enough(address, json.loads(answer[0].removeprefix("RESOURCES ")), config)


def _enough(address: str, resources: dict[str, float], config: Config | None) -> Check:
    """Compare the cluster's resources with those that the workers need."""
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    found = f"{address}: {cpus:g} CPUs, {gpus:g} GPUs"
    if config is not None:
        need_cpus = config.cluster.min_workers * config.cluster.cpus_per_worker
        need_gpus = config.cluster.min_workers * config.cluster.gpus_per_worker
        if cpus < need_cpus or gpus < need_gpus:
            return Check(
                "ray",
                False,
                f"{found}; {config.name} needs {need_cpus:g} CPUs, {need_gpus:g} GPUs",
                "wait for the cluster to grow, or lower cluster.workers, cpus_per_worker or gpus_per_worker",
            )
    return Check("ray", True, found)


def disk_checks(config: Config | None) -> Iterator[Check]:
    """Check the free space of the run folder and of the asset cache."""
    places = {"run folder": lambda: Path(config.runs_dir if config else ".").absolute(), "cache": cache_dir}
    for name, find in places.items():
        try:
            place = find()
            folder = _nearest_existing(place)
        except GlannError as error:
            yield Check("disk", False, *str(error).split("; ", 1))
            continue
        free = shutil.disk_usage(folder).free
        need = MIN_DISK_GIB * GIB
        if name == "cache" and config and config.data.url.startswith("s3://") and config.data.cache_dir is None:
            need += int(config.data.cache_gb * 1e9)
        found = f"{name} {place}: {free / GIB:.0f} GiB free"
        if not os.access(folder, os.W_OK):
            yield Check(
                "disk", False, f"{name} {place} cannot be written", "choose another folder (runs_dir, GLANN_CACHE)"
            )
        elif free < need:
            yield Check("disk", False, f"{found}, {need / GIB:.0f} needed", "free some, or choose another folder")
        else:
            yield Check("disk", True, found)


def _nearest_existing(path: Path) -> Path:
    path = expand(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def shared_memory() -> Check:
    """Check the free shared memory, where Ray keeps its objects; a container's default of 64 MB makes it very slow."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", True, "not limited on this system")
    free = shutil.disk_usage(folder).free
    if free < MIN_SHM_GIB * GIB:
        return Check(
            "shared memory", False, f"{free >> 20} MiB free in {folder}", "docker run --shm-size=8g, or free some"
        )
    return Check("shared memory", True, f"{free / GIB:.0f} GiB free")


def proxies(config: Config) -> Iterator[Check]:
    """Name the proxies between this machine and the servers of the run, and check that they answer."""
    tracker = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    urls = [tracker] if config.tracking.enabled else []
    if any(url.startswith("s3://") for url in config.places):
        with contextlib.suppress(UserError):  # the check of the transport reports a wrong endpoint
            urls.append(endpoint_of(config.s3) or "https://s3.amazonaws.com")
    for url in urls:
        if (proxy := proxy_of(url, reads_all_proxy=url == tracker)) is None:
            continue
        fault = "" if _answers(proxy.url) else "; nothing answers there"
        if not fault and security.is_loopback(proxy.host):
            fault = ", which cannot know this machine's loopback interface"
        yield Check("proxy", not fault, f"{proxy}{fault}", f"correct {proxy.variable}, or {proxy.remedy}")


def _answers(proxy: str) -> bool:
    try:
        split = urlsplit(proxy if "://" in proxy else f"//{proxy}")
        return bool(split.hostname) and listens(str(split.hostname), split.port or 80)
    except ValueError:  # half a bracket, or a port that is no number
        return False


def data_set(config: Config) -> Check:
    """Check the index, its fit to the configuration, and the last image of the first and last shard."""
    return _checked("data", lambda: _read_data(config))


def _read_data(config: Config) -> str:
    data = config.data
    try:
        index = Index.load(data.url, config.s3)
    except UserError as error:
        if data.source is not None and isinstance(error.__cause__, MissingObject):
            return f"nothing at {data.url} yet; training will pack {data.source} into it"
        raise
    require_fit(index, data, config.cluster.max_workers)
    held_out_of(config, index)
    store = open_store(data.url, config.s3)
    first_shard_end = int(index.first_S[1]) - 1 if len(index.first_S) > 1 else index.rows - 1
    for row in sorted({first_shard_end, index.rows - 1}):
        record = index.records[row]
        shard = index.shards[index.shard_of(row)]
        image = store.read_range(shard.file, int(record["offset"]), int(record["length"]))
        if hashlib.sha256(image).digest() != record["sha256"].tobytes():
            verify = shlex.join(["glann", "data", "verify", data.url])
            raise UserError(f"{shard.file} in {data.url} is damaged at {index.key(row)}; run `{verify}`")
    return (
        f"{data.url}: {counted(index.rows, 'image')} of {index.resolution} px in {counted(len(index.shards), 'shard')}"
    )


def checkpoints(config: Config) -> Check:
    """Write an object to the checkpoint store, read it back and remove it."""
    return _checked("checkpoints", lambda: _try_checkpoints(config))


def _try_checkpoints(config: Config) -> str:
    url = config.checkpoint_url
    if (place := local_folder(url)) is not None:
        folder = _nearest_existing(place)
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder} cannot be written; set checkpoint.url or runs_dir")
        return f"{url} (every machine of the cluster must share it)" if ray_address(config) else url
    store = open_store(url, config.s3)
    store.write(PROBE_KEY, b"probe")
    try:
        echoed = store.read(PROBE_KEY)
    finally:
        store.delete(PROBE_KEY)
    if echoed != b"probe":
        raise UserError(f"{url} returned other bytes than were written; check the server behind it")
    if not enforces_conditions(store):
        return f"{url} (written and read back; no If-None-Match: a second command on one run may not be refused)"
    return f"{url} (written and read back)"


def _checked(name: str, probe: Callable[[], str]) -> Check:
    """A check that fails with the error of `probe`, which contains the remedy."""
    try:
        return Check(name, True, probe())
    except GlannError as error:
        return Check(name, False, str(error))
