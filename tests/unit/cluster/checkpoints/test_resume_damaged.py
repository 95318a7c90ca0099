"""Protects a night of training: a worker that meets a damaged checkpoint says so and goes on from the one before."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
from glann.cluster.checkpoints.retention import usable
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.cluster.latents import LatentTable
from glann.config.run import load
from glann.errors import UserError
from glann.storage.local import LocalStore
from glann.trainers.objective import loss_weights
from glann.trainers.run.events import CheckpointDamaged, Resumed
from glann.trainers.run.state import Position, Saved
from glann.trainers.run.worker import Worker

ROWS = range(12)
CONFIG = load("digits")
INDEX = SimpleNamespace(fingerprint="f" * 64)
WEIGHTS = "a" * 64


@pytest.fixture
def store(tmp_path):
    """Checkpoints of steps 1 to 3, each with its number in every value."""
    store = LocalStore(tmp_path)
    table = LatentTable.in_process(ROWS, 4, 0)
    for step in (1, 2, 3):
        writer = CheckpointWriter(store, 0, 1, 9, 20.0, f"attempt{step}")
        tensors = {"a": torch.full((3,), float(step))}
        generator = {"weights": tensors, "exp_avg": tensors, "exp_avg_sq": tensors, "updates": float(step)}
        saved = Saved(Position("glo", 1, step, step), {"generator": generator})
        table.apply(0, step, list(ROWS), torch.ones(len(ROWS), 4), 0.1)
        writer.save(step, saved.files(), table, saved.state(INDEX, len(ROWS), CONFIG, WEIGHTS))
        writer.wait()
    return store


class Images(list):
    index = INDEX


def resumed(store, weights: str | None = WEIGHTS):
    """A worker's `resume` alone, and the events that it sent."""
    events = []
    worker = Worker.__new__(Worker)
    worker.store, worker.rank, worker.world, worker.rows = store, 0, 1, ROWS
    worker.images, worker.device = Images(ROWS), torch.device("cpu")
    worker.latents = LatentTable.in_process(ROWS, 4, 99)
    worker.reporter = SimpleNamespace(send=events.append)
    worker.infos, worker.loss_weights = {"glo": None, "imle": None}, weights
    return worker.resume(), worker.latents, events


def flip(store, step, name):
    (key,) = (key for key in store.list(f"step-{step:06d}/") if key.endswith(name))
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.write(key, bytes(data))


def test_the_newest_is_taken_where_all_are_good(store):
    saved, latents, events = resumed(store)
    assert saved.position.serial == 3
    assert (latents.visits() == 3).all()
    assert [type(event) for event in events] == [Resumed]


@pytest.mark.parametrize("name", ["latents-0-12.safetensors", "generator_exp_avg.safetensors", "state.json"])
def test_a_file_with_another_hash_sends_the_run_back_by_one_and_is_reported(store, name):
    flip(store, 3, name)
    saved, latents, events = resumed(store)
    assert saved.position.serial == 2
    assert float(saved.networks["generator"]["weights"]["a"][0]) == 2.0
    assert (latents.visits() == 2).all()
    damage, resumption = events
    assert isinstance(damage, CheckpointDamaged)
    assert damage.step == 3
    assert name in damage.reason
    assert resumption == Resumed(saved.position)
    assert usable(store)[0] == [2, 1]
    again = [type(event) for event in resumed(store)[2]]
    assert again == [CheckpointDamaged, Resumed]  # reported again, and not read again


def test_a_missing_file_and_a_damaged_one_send_it_back_by_two(store):
    store.delete("step-000003/attempt3/state.json")
    flip(store, 2, "latents-0-12.safetensors")
    saved, _, events = resumed(store)
    assert saved.position.serial == 1
    assert sorted(event.step for event in events if isinstance(event, CheckpointDamaged)) == [2, 3]


def test_where_all_are_damaged_nothing_is_begun_anew_and_nothing_marked(store):
    for step in (1, 2, 3):
        flip(store, step, "latents-0-12.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint of .* can be used"):
        resumed(store)
    assert not [key for key in store.list() if key.endswith("damaged.json")]


def test_a_run_without_checkpoints_begins(tmp_path):
    saved, _, events = resumed(LocalStore(tmp_path))
    assert (saved.position, events) == (Position("glo"), [])


def test_other_weights_of_the_loss_network_are_refused(store):
    """Their address may be the same: it is the file that counts."""
    with pytest.raises(UserError, match=r"other weights of the loss network \(SHA-256 aaaaaaaaaaaa\) than .*\(bbbbbb"):
        resumed(store, "b" * 64)
    assert resumed(store, None)[0].position.serial == 3, "a run without a loss network"


def test_the_weights_of_a_file_are_known_by_its_content(tmp_path):
    path = tmp_path / "vgg.safetensors"
    given = load("digits", [f"loss.weights={path}"])
    with pytest.raises(UserError, match=r"vgg\.safetensors"):
        loss_weights(given)
    path.write_bytes(b"one")
    one = loss_weights(given)
    path.write_bytes(b"two")
    assert loss_weights(given) != one == hashlib.sha256(b"one").hexdigest()
    assert loss_weights(load("digits", ["loss.kind=l1"])) is None
    assert len(loss_weights(load("digits"))) == 64, "of a named asset, which need not be there yet"
