"""Memory of a host's processes, limited and measured by a control group, as Kubernetes does for a pod.

Version 1 and version 2 of control groups; root is needed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

GIB = 1 << 30


class MemoryGroup:
    """A control group for memory. `limit`: bytes; its processes are killed where they need more. None: no limit."""

    def __init__(self, name: str, limit: int | None = None) -> None:
        self.limit = limit
        root, self.version = _hierarchy()
        self.folder = root / name
        self.folder.mkdir()
        if limit is not None:
            (self.folder / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")).write_text(str(limit))

    @property
    def processes(self) -> Path:
        """The file into which a process writes 0 to join the group."""
        return self.folder / "cgroup.procs"

    @property
    def peak(self) -> int:
        """The most that the group ever held, in bytes, with files that the kernel kept in memory."""
        return int(self._read("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"))

    @property
    def own(self) -> int:
        """What the processes hold now that the kernel cannot give back: their memory, and what they share."""
        keys = ("anon", "shmem") if self.version == 2 else ("total_rss", "total_shmem")
        stat = dict(line.split() for line in self._read("memory.stat").splitlines())
        return sum(int(stat.get(key, 0)) for key in keys)

    @property
    def killed(self) -> int:
        """How many processes were killed because the limit was reached."""
        lines = self._read("memory.events" if self.version == 2 else "memory.oom_control").splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    def pids(self) -> list[int]:
        """Its processes."""
        return [int(pid) for pid in self.processes.read_text().split()]

    def close(self) -> None:
        """Remove the group, once its processes have ended."""
        for _ in range(100):
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text()


class Peaks:
    """The most memory of every kind of process, and of every group, while the context lasts.

    Args:
        groups: the control group of a host, by its name.
    """

    def __init__(self, groups: Mapping[str, MemoryGroup]) -> None:
        self.groups = groups
        self.of_process: dict[tuple[str, str], int] = {}  # bytes, by host and title
        self.of_group = dict.fromkeys(groups, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peaks", daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            for host, group in self.groups.items():
                self.of_group[host] = max(self.of_group[host], group.own)
                for pid in group.pids():
                    with contextlib.suppress(OSError, KeyError, ValueError):  # it just ended
                        self._note(host, pid)

    def _note(self, host: str, pid: int) -> None:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) << 10
        key = (host, title(Path(f"/proc/{pid}/cmdline").read_bytes()))
        self.of_process[key] = max(self.of_process.get(key, 0), peak)

    def table(self, at_least: int = 100 << 20) -> list[str]:
        """A line for each host, and for each of its processes that took so much."""
        lines = []
        for host, group in self.groups.items():
            limit = f", limit {group.limit / GIB:.2f} GiB" if group.limit else ""
            lines.append(f"{host}: {self.of_group[host] / GIB:.2f} GiB of its processes at once{limit}")
            found = sorted(((peak, name) for (at, name), peak in self.of_process.items() if at == host), reverse=True)
            lines += [f"    {peak / GIB:5.2f} GiB  {name}" for peak, name in found if peak >= at_least]
        return lines


def title(command_line: bytes) -> str:
    """A short name of a process, from its command line."""
    words = [word for word in command_line.decode(errors="replace").split("\0") if word]
    if not words or words[0].startswith("ray::"):
        return words[0].split(".")[0] if words else ""
    if "-m" in words[:4]:
        at = words.index("-m")
        return " ".join(words[at + 1 : at + 4])[:60]
    names = [Path(word).name for word in words[:3] if not word.startswith("-")]
    return " ".join(names)[:60]


def why_not() -> str | None:
    """Why no control group can be made here, or None."""
    try:
        MemoryGroup(f"glann-probe-{os.getpid()}", GIB).close()
    except (OSError, LookupError) as error:
        return f"cannot limit memory by a control group here: {error}"
    return None


def _hierarchy() -> tuple[Path, int]:
    """The root of the control groups of memory, and their version."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, place, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(place), 1
    for _, place, kind, *_ in mounts:
        if kind == "cgroup2" and "memory" in Path(place, "cgroup.controllers").read_text().split():
            Path(place, "cgroup.subtree_control").write_text("+memory")
            return Path(place), 2
    raise LookupError("there is no hierarchy for memory")
