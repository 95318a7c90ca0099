"""Main memory that a process may use: of the machine, or of its control group, by which Kubernetes limits a pod."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes: used, without files that the kernel can drop, and in all."""

    used: int
    total: int


def usable_memory() -> Memory:
    """The memory of this machine, or of the control group with the least room that this process is in."""
    import psutil

    machine = psutil.virtual_memory()
    found = [Memory(machine.total - machine.available, machine.total), *group_memories()]
    return min(found, key=lambda memory: memory.total)


def group_memories(of_process: Path = OF_PROCESS, groups: Path = GROUPS) -> Iterator[Memory]:
    """Memory of the control groups of a process that have a limit, version 1 and 2.

    In a container the path of its own group may be that on the host, which is not visible there: its group is then the
    root of what is mounted.
    """
    for line in _read(of_process).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            yield from _limited(groups, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limited(groups / "memory", path, names)


def _limited(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[Memory]:
    """Those of a group and of the groups around it that have a limit. names: of files, and of a line of memory.stat."""
    limit_file, used_file, droppable = names
    group = PurePosixPath(path.lstrip("/"))
    for folder in (root / group, *(root / parent for parent in group.parents if parent != group)):
        limit, used = _read(folder / limit_file).strip(), _read(folder / used_file).strip()
        if not limit.isdecimal() or not used.isdecimal() or int(limit) >= 1 << 60:  # "max", or version 1's "no limit"
            continue
        stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if " " in line)
        yield Memory(max(0, int(used) - int(stat.get(droppable, 0))), int(limit))


def _read(path: Path) -> str:
    """Its text; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
