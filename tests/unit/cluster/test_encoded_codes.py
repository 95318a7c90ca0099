"""Codes that an encoder writes: they replace those of their rows, and no others, without a state beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.latent_shard import LatentShard
from glann.cluster.latents import LatentTable
from glann.errors import UserError

ROWS, D = range(5, 12), 3


def shard() -> LatentShard:
    return LatentShard(ROWS, D, 0, optimizer="none", constraint="none")


def test_rows_are_replaced_and_no_others_move():
    table = LatentTable.in_process(ROWS, D, 0, optimizer="none", constraint="none")
    before = table.codes()
    table.prefetch([6, 7])
    table.replace([7, 5], torch.tensor([[7.0, 7.5, -8.0], [0.0, 0.0, 0.0]]))
    assert table.gather([6, 7])[1].tolist() == [7.0, 7.5, -8.0]  # not what was gathered ahead
    expected = before.clone()
    expected[2], expected[0] = torch.tensor([7.0, 7.5, -8.0]), torch.zeros(3)
    assert torch.equal(table.codes(), expected)
    assert table.visits().tolist() == [0] * len(ROWS)
    assert table.snapshot().keys() == {"z", "steps"}  # one code a row, and no moments


def test_a_snapshot_that_is_being_written_does_not_see_it(tmp_path, monkeypatch):
    from threading import Event

    from glann.cluster import latent_shard

    held, go = shard(), Event()
    before, read = held.codes(), []

    def write(store, folder, start, snapshot, block):
        go.wait(20)
        read.append(snapshot.read(0, len(ROWS))["z"].numpy())
        return {}

    monkeypatch.setattr(latent_shard, "write_rows", write)
    held.start_saving(None, "", 1)
    held.replace(list(ROWS), np.ones((len(ROWS), D), np.float32))
    go.set()
    held._saving.result(20)
    assert np.array_equal(read[0], before)
    assert (held.codes() == 1).all()


def test_impossible_codes_change_nothing():
    held = shard()
    before = held.codes()
    bad = np.array([[0, 1, np.nan], [1, 1, 1]], np.float32)
    with pytest.raises(UserError, match=r"codes of rows \[6\] are not finite; lower autoencoder\.lr"):
        held.replace([6, 7], bad)
    with pytest.raises(IndexError):
        held.replace([4, 6], np.ones((2, D), np.float32))
    with pytest.raises(ValueError, match="codes of shape"):
        held.replace([6, 7], np.ones((2, D + 1), np.float32))
    with pytest.raises(ValueError, match="replaced, not trained"):
        held.apply(0, 0, [6], np.ones((1, D), np.float32), 0.1)
    assert np.array_equal(held.codes(), before)
