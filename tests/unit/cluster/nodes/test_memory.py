"""The memory of a pod is that of its control group: a machine of 512 GiB says nothing about a worker of 16."""

from __future__ import annotations

from pathlib import Path

import pytest
from glann.cluster.nodes import memory
from glann.cluster.nodes.memory import Memory, group_memories, usable_memory

GIB = 1 << 30
UNLIMITED = 9223372036854771712  # as version 1 writes it


def group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def second(limit: object, used: int, inactive: int) -> dict[str, object]:
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 1\ninactive_file {inactive}"}


def first(limit: int, used: int, inactive: int) -> dict[str, object]:
    stat = f"inactive_file 0\ntotal_inactive_file {inactive}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


@pytest.fixture
def found(tmp_path: Path):
    def read(of_process: str) -> list[Memory]:
        (tmp_path / "self").write_text(of_process)
        return list(group_memories(tmp_path / "self", tmp_path / "groups"))

    return read


def test_a_pod_of_version_2(tmp_path: Path, found):
    """Inside, its group is the root of what is mounted."""
    group(tmp_path / "groups", second(16 * GIB, 5 * GIB, 2 * GIB))
    assert found("0::/\n") == [Memory(3 * GIB, 16 * GIB)]


def test_a_group_has_the_limits_of_those_around_it(tmp_path: Path, found):
    group(tmp_path / "groups" / "slice", second(8 * GIB, 4 * GIB, 0))
    group(tmp_path / "groups" / "slice" / "unit", second("max", 2 * GIB, 0))
    assert found("0::/slice/unit\n") == [Memory(4 * GIB, 8 * GIB)]


def test_a_pod_of_version_1_whose_path_is_the_hosts(tmp_path: Path, found):
    group(tmp_path / "groups" / "memory", first(6 * GIB, 3 * GIB, GIB))
    lines = "5:cpu,cpuacct:/kubepods/x\n4:memory:/kubepods/x\n0::/\n"
    assert found(lines) == [Memory(2 * GIB, 6 * GIB)]


def test_no_limit_is_none_in_either_version(tmp_path: Path, found):
    group(tmp_path / "groups" / "memory", first(UNLIMITED, 3 * GIB, GIB))
    group(tmp_path / "groups", second("max", 3 * GIB, GIB))
    assert found("4:memory:/\n0::/\n") == []


def test_without_control_groups_it_is_the_machines(monkeypatch: pytest.MonkeyPatch):
    import psutil

    monkeypatch.setattr(memory, "group_memories", lambda: [])
    assert usable_memory().total == psutil.virtual_memory().total


def test_the_least_of_all_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "group_memories", lambda: [Memory(3, 1 << 20), Memory(1, 1 << 30)])
    assert usable_memory() == Memory(3, 1 << 20)
