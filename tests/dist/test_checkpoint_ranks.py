"""Protects saving by real processes: they agree on an attempt and commit together."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.cluster.checkpoints.reader import load_rows, load_tensors
from glann.cluster.checkpoints.retention import latest
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.storage.open import open_store

ROWS, DIM = 31, 2


def save(url: str, step: int):
    """Start like a worker of a run, and save."""
    rank, world = dist.get_rank(), dist.get_world_size()
    writer = CheckpointWriter(open_store(url), rank, world, 2, 60.0)
    table = LatentTable.in_process(ranges(ROWS, world)[rank], DIM, seed=7)
    tensors = {"generator": {f"layer-{number}": torch.full((100,), float(number)) for number in range(7)}}
    writer.save(step, tensors, table, {"step": step})
    return writer._attempt, writer.wait().step


def test_ranks_agree_on_an_attempt_and_commit_together(local_ray, gloo_group, tmp_path):
    store = open_store(str(tmp_path))
    store.write("step-000001/killed/part-1.json", b'{"attempt":"killed","world":3,"files":{}}')
    attempts = []
    with gloo_group(3) as members:
        for step in (1, 2):
            answers = local_ray.get([member.run.remote(save, str(tmp_path), step) for member in members], timeout=120)
            assert len(set(answers)) == 1
            attempts.append(answers[0])
    assert attempts[0][0] != attempts[1][0]
    assert latest(store) == 2
    codes = LatentTable.in_process(range(ROWS), DIM, seed=7).codes().numpy()
    np.testing.assert_array_equal(load_rows(store, 2, range(5, 25))["z"], codes[5:25])
    assert {name: float(layer[0]) for name, layer in load_tensors(store, 2, "generator").items()} == {
        f"layer-{number}": number for number in range(7)
    }
