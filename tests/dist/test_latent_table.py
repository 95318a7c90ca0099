"""Protects the latent table as an actor: what runs behind the step gives what running in line gives."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import Share, epoch_plan
from glann.storage.local import LocalStore
from glann.errors import EnvironmentFault, UserError
from safetensors.numpy import load_file

ROWS, DIM, BATCH, LR = range(40, 103), 8, 10, 0.05


@pytest.fixture
def table(local_ray):
    table = LatentTable.spawn(ROWS, DIM, seed=3)
    yield table
    table.close()


def until(seconds: float, call) -> None:
    """Call again and again, until it says True, raises or time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if call() is True:
            return
        time.sleep(0.1)


def train(table, way: str, epochs=4) -> list[torch.Tensor]:
    """A stand-in for training, in which the gradient depends on the code that was gathered.

    way: codes are asked for "late", when they are needed, "ahead" by one batch, or "together" with the update
    before the last.
    """
    seen = []
    plan = [(e, p) for e in range(epochs) for p in epoch_plan(0, e, ROWS, Share(BATCH), [len(ROWS)])]
    for number, (epoch, planned) in enumerate(plan):
        z_BD = table.gather(planned.rows_B)
        if way == "ahead" and number + 1 < len(plan):
            table.prefetch(plan[number + 1][1].rows_B)
        real_B = planned.weight_B > 0
        seen.append(z_BD)
        grad_BD = torch.sin(7 * z_BD + number)[torch.from_numpy(real_B)]
        together = way == "together" and number + 2 < len(plan)
        ahead_B = plan[number + 2][1].rows_B if together else None
        table.apply(epoch, planned.step, planned.rows_B[real_B], grad_BD, LR, ahead_B=ahead_B)
        grad_BD.zero_()  # the caller may reuse its memory at once
    return seen


@pytest.mark.parametrize("way", ["ahead", "together"])
@pytest.mark.parametrize("in_flight", [1, 8])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_running_behind_the_step_gives_the_synchronous_result_bit_for_bit(local_ray, optimizer, in_flight, way):
    behind = LatentTable.spawn(ROWS, DIM, seed=3, optimizer=optimizer, in_flight=in_flight)
    in_line = LatentTable.in_process(ROWS, DIM, seed=3, optimizer=optimizer)
    for a, b in zip(train(behind, way), train(in_line, "late"), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(behind.codes(), in_line.codes())
    expected = in_line.snapshot()
    for name, array in behind.snapshot().items():
        np.testing.assert_array_equal(array, expected[name])
    assert (behind.visits() == 4).all()
    behind.close()


def test_the_same_position_twice_is_applied_once(table):
    grad = torch.randn(2, DIM)
    table.apply(0, 0, [50, 51], grad, LR)
    once = table.codes()
    table.apply(0, 0, [50, 51], grad, LR)
    table.skip(0, 0, [52])
    assert torch.equal(table.codes(), once)
    assert table.visits().sum() == 2


def test_the_shard_lives_on_the_node_of_its_owner(table, local_ray):
    here = local_ray.get_runtime_context().get_node_id()
    actor = table._shard.actor
    there = actor.__ray_call__.remote(lambda shard: __import__("ray").get_runtime_context().get_node_id())
    assert local_ray.get(there) == here


def test_a_failed_update_is_raised_by_a_flush_or_within_the_updates_under_way_and_changes_nothing(table):
    before = table.codes()
    table.apply(0, 0, [60], torch.full((1, DIM), float("inf")), LR)
    with pytest.raises(UserError, match=r"rows \[60\]"):
        table.flush()
    assert torch.equal(table.codes(), before)
    table.apply(0, 1, [999], torch.zeros(1, DIM), LR)
    later = iter(range(2, 2 + 8))  # as many as may be under way
    with pytest.raises(IndexError, match=r"40\.\.102"):
        until(60, lambda: table.apply(0, next(later), [60], torch.zeros(1, DIM), LR))


def test_a_failed_update_is_raised_where_the_codes_that_were_gathered_with_it_are_taken(table):
    table.apply(0, 0, [60], torch.full((1, DIM), float("inf")), LR, ahead_B=[70])
    with pytest.raises(UserError, match=r"rows \[60\]"):
        table.gather([70])
    table.flush()  # raised once


def test_rows_are_written_by_the_shard_as_they_were_when_saving_began(table, tmp_path):
    train(table, "together", epochs=1)
    before = table.snapshot()
    saved = table.start_saving(LocalStore(tmp_path), "step-000001/a", 500)
    train(table, "together", epochs=2)  # goes on meanwhile
    until(30, lambda: saved() is not None)
    files = saved()
    assert len(files) > 3
    held = {}
    for name, file in files.items():
        assert (tmp_path / "step-000001" / "a" / name).stat().st_size == file.size
        block = load_file(tmp_path / "step-000001" / "a" / name)
        for key, array in block.items():
            held.setdefault(key, []).append((int(name.split("-")[1]), array))
    assert set(held) == set(before)
    for key, blocks in held.items():
        np.testing.assert_array_equal(
            np.concatenate([array for _, array in sorted(blocks, key=lambda b: b[0])]), before[key]
        )
    assert not np.array_equal(table.snapshot()["z"], before["z"])


def test_rows_that_could_not_be_written_are_reported(table, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    saved = table.start_saving(LocalStore(tmp_path / "file"), "step-000001/a", 500)
    with pytest.raises(UserError, match="file"):
        until(30, saved)
    assert table.start_saving(LocalStore(tmp_path), "step-000001/a", 500) is not saved


def test_a_shard_whose_process_died_is_an_environment_fault(local_ray):
    table = LatentTable.spawn(ROWS, DIM, seed=3)
    table.flush()
    local_ray.kill(table._shard.actor)
    with pytest.raises(EnvironmentFault, match=r"latent rows 40\.\.102"):
        table.codes()


def test_a_snapshot_is_taken_between_updates_and_restores_elsewhere(table, local_ray):
    train(table, "ahead", epochs=1)
    saved, codes = table.snapshot(), table.codes()
    train_more = torch.randn(len(ROWS), DIM)
    table.apply(1, 0, list(ROWS), train_more, LR)
    other = LatentTable.spawn(ROWS, DIM, seed=99)
    other.restore(saved, (0, 6))
    assert torch.equal(other.codes(), codes)
    assert not torch.equal(table.codes(), codes)
    other.apply(0, 6, list(ROWS), train_more, LR)  # a position that the snapshot covers
    assert torch.equal(other.codes(), codes)
    other.apply(1, 0, list(ROWS), train_more, LR)
    assert torch.equal(other.codes(), table.codes())
    other.close()


def test_the_shard_ends_with_the_worker_that_owns_it(local_ray):
    @local_ray.remote(num_cpus=1)
    class Worker:
        def start(self):
            self.table = LatentTable.spawn(ROWS, DIM, seed=3)
            self.table.flush()
            return [self.table._shard.actor]

    worker = Worker.remote()
    (shard,) = local_ray.get(worker.start.remote())
    local_ray.get(shard.visits.remote())
    local_ray.kill(worker)
    with pytest.raises(local_ray.exceptions.RayActorError):
        until(60, lambda: local_ray.get(shard.visits.remote()))
