"""A snapshot is bit for bit the table at the moment when it was taken, whatever changes while it is read."""

from __future__ import annotations

import secrets
from threading import Event, Thread

import pytest
import torch
from glann.cluster.latent_shard import LatentShard
from glann.cluster.snapshot import Snapshot


@pytest.fixture
def rng() -> torch.Generator:
    seed = secrets.randbits(32)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def rows(n: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {"z": torch.randn(n, 7, generator=rng), "steps": torch.randint(100, (n,), generator=rng, dtype=torch.int32)}


def change(live: dict[str, torch.Tensor], at_B: torch.Tensor) -> None:
    live["z"][at_B] += 1.5
    live["steps"][at_B] += 1


def read_all(snapshot: Snapshot, block: int) -> dict[str, torch.Tensor]:
    parts = [snapshot.read(at, min(at + block, len(snapshot))) for at in range(0, len(snapshot), block)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_changes_between_reads_are_not_seen(rng):
    live = rows(103, rng)
    before = {name: tensor.clone() for name, tensor in live.items()}
    snapshot, parts = Snapshot(live), []
    for at in range(0, 103, 10):
        for _ in range(3):  # rows that were read, rows that were not, and some of them again
            at_B = torch.randperm(103, generator=rng)[:20]
            snapshot.preserve(at_B)
            change(live, at_B)
        parts.append(snapshot.read(at, min(at + 10, 103)))
    for name, tensor in before.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
        assert not torch.equal(live[name], tensor)


def test_changes_during_a_read_are_not_seen(rng):
    live = rows(20_011, rng)
    before = {name: tensor.clone() for name, tensor in live.items()}
    snapshot, stop = Snapshot(live), Event()
    changes = [torch.randperm(20_011, generator=rng)[:64] for _ in range(200)]

    def train() -> None:
        while not stop.is_set():
            for at_B in changes:
                snapshot.preserve(at_B)
                change(live, at_B)

    training = Thread(target=train)
    training.start()
    try:
        seen = read_all(snapshot, 501)
    finally:
        stop.set()
        training.join()
    assert all(torch.equal(seen[name], tensor) for name, tensor in before.items())
    assert not torch.equal(live["z"], before["z"])


def test_rows_are_read_once_and_in_order(rng):
    snapshot = Snapshot(rows(10, rng))
    snapshot.read(0, 4)
    for start in (0, 5):
        with pytest.raises(ValueError, match=f"4 comes next, not {start}"):
            snapshot.read(start, 10)


def test_two_savings_of_a_shard_each_see_their_own_moment(rng):
    shard = LatentShard(range(5, 36), 4, seed=1)

    def step(number: int) -> None:
        shard.apply(0, number, torch.arange(5, 36, 2).numpy(), torch.randn(16, 4, generator=rng).numpy(), 0.1)

    moments = []
    for number in range(2):
        step(number)
        shard._snapshots.append(Snapshot(shard._state()))
        moments.append(shard.snapshot())
    step(2)
    for snapshot, moment in zip(shard._snapshots, moments, strict=True):
        seen = read_all(snapshot, 9)
        assert set(seen) == set(moment)
        assert all(torch.equal(seen[name], torch.from_numpy(array)) for name, array in moment.items())
