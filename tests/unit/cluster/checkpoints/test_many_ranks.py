"""A commit of a thousand ranks: every part is read once, however often rank 0 looks, and the others wait patiently."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from glann.cluster.checkpoints import writer
from glann.cluster.checkpoints.layout import File, Part
from glann.cluster.checkpoints.parts import Parts
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.errors import EnvironmentFault
from glann.storage.base import MissingObject


class MemoryStore:
    """Objects in memory, and the requests for them."""

    url = "s3://bucket/run"

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.read_keys: Counter[str] = Counter()
        self.lock = threading.Lock()

    def counted(self, kind, key=""):
        with self.lock:
            self.requests[kind] += 1
            if kind == "read":
                self.read_keys[key] += 1

    def read(self, key):
        self.counted("read", key)
        if key not in self.objects:
            raise MissingObject(key)
        return self.objects[key]

    def size(self, key):
        self.counted("size")
        if key not in self.objects:
            raise MissingObject(key)
        return len(self.objects[key])

    def write(self, key, data, only_if_absent=False):
        self.counted("write")
        self.objects[key] = data if isinstance(data, bytes) else b"".join(bytes(piece) for piece in data)

    def list(self, prefix=""):
        self.counted("list")
        return sorted(key for key in list(self.objects) if key.startswith(prefix))

    def sizes(self, prefix=""):
        self.counted("list")
        return {key: len(data) for key, data in sorted(self.objects.items()) if key.startswith(prefix)}

    def delete(self, key):
        self.counted("delete")
        with self.lock:
            self.objects.pop(key, None)


def part_of(world: int, rank: int) -> bytes:
    size = File(size=0, sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    return Part(attempt="a", world=world, files={f"g-{rank}.json": size}).model_dump_json().encode()


def test_parts_are_read_once_and_of_this_attempt_only():
    store = MemoryStore()
    parts = Parts(store, "step-000001/a/part-", "a", 5)
    assert parts.missing() == [0, 1, 2, 3, 4]
    store.write("step-000001/a/part-3.json", part_of(5, 3))
    store.write("step-000001/a/part-4.json", part_of(4, 4))  # of a group of another size
    for _ in range(3):
        assert parts.missing() == [0, 1, 2, 4]
    assert store.requests["read"] == 2


@pytest.mark.parametrize("world", [7, 1024])
def test_rank_0_reads_each_part_once_while_they_arrive_and_commits_when_all_are_there(world, monkeypatch):
    monkeypatch.setattr(writer, "_POLL_S", (0.001, 0.01))
    monkeypatch.setattr(writer, "_REQUESTS_PER_S", 1e9)
    store, polls = MemoryStore(), []
    late = iter(range(1, world))
    listed = store.list

    def list_(prefix=""):
        """At each look some more parts have arrived."""
        polls.append(prefix)
        for rank in [rank for _, rank in zip(range(world // 5), late, strict=False)]:
            store.objects[f"step-000001/a/part-{rank}.json"] = part_of(world, rank)
            store.objects[f"step-000001/a/g-{rank}.json"] = b""
        return listed(prefix)

    store.list = list_
    rank_0 = CheckpointWriter(store, 0, world, 3, 60.0, "a")
    rank_0.save(1, state={"step": 1})
    rank_0.wait()
    assert len([prefix for prefix in polls if "part-" in prefix]) >= 5
    reads = {key: count for key, count in store.read_keys.items() if "part-" in key}
    assert reads == {f"step-000001/a/part-{rank}.json": 1 for rank in range(world)}
    assert not [key for key in store.objects if "part-" in key]
    assert len(store.objects) == world - 1 + 2  # files of the ranks, state and manifest


def test_ranks_that_wait_share_the_requests_of_the_store(monkeypatch):
    """A thousand that look every second are a thousand requests a second."""
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) > 40:
            now[0] += 1000.0

    now = [0.0]
    monkeypatch.setattr(writer.time, "sleep", sleep)
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    for world, longest in ((2, 1.0), (1000, 10.0)):
        pauses.clear()
        now[0] = 0.0
        rank_1 = CheckpointWriter(MemoryStore(), 1, world, 3, 600.0, "a")
        with pytest.raises(EnvironmentFault, match="nothing from rank 0"):
            rank_1._wait_until(lambda: False, 1, Parts(MemoryStore(), "step-000001/a/part-", "a", world))
        assert max(pauses) == longest
