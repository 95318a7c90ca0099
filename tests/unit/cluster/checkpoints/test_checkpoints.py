"""Protects checkpoints: whole or absent, independent of the number of workers, and never trusted when read."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time

import numpy as np
import pytest
import torch
from glann.cluster.checkpoints.best import Best, find_step, named_best, usable_best
from glann.cluster.checkpoints.layout import FOLDER, DamagedCheckpoint, Manifest, file_key
from glann.cluster.checkpoints.reader import load_rows, load_state, load_tensors, names
from glann.cluster.checkpoints.retention import latest, remove_torn, retain
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.cluster.placement import ranges
from glann.errors import EnvironmentFault, UserError
from glann.storage.open import open_store
from held_rows import Held

ROWS, DIM = 23, 3


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "checkpoints"))


def table(value=0.0):
    """A latent table whose every number tells its row."""
    rows = np.arange(ROWS)
    z = (rows[:, None] + np.arange(DIM) / 10 + value).astype(np.float32)
    return {"z": z, "accumulator": z[:, 0].copy(), "steps": rows.astype(np.int32)}


def networks(value=0.0):
    return {
        "generator": {"fc.weight": torch.full((4, 2), value), "norm.count": torch.tensor(7)},
        "generator-ema": {"fc.weight": torch.full((4, 2), value, dtype=torch.bfloat16)},
    }


def path(store, name, step=1):
    """Where a file of a checkpoint lies."""
    return file_key(Manifest.model_validate_json(store.read(f"step-{step:06d}/manifest.json")), name)


def writers(store, world, attempt="a", keep=3, timeout=20.0, **options):
    return [CheckpointWriter(store, rank, world, keep, timeout, attempt, **options) for rank in range(world)]


def measured(step, value, **others) -> Best:
    given = {"metric": "fd_squeezenet", "better": "lower", "sampler": "imle", "samples": 100, "stage": "imle"}
    return Best.model_validate({"step": step, "value": value, "epoch": step, **given, **others})


def save(ranks, step, value=0.0, score=lambda: None, wait=True):
    for writer, own in zip(ranks, ranges(ROWS, len(ranks)), strict=True):
        part = {name: array[own.start : own.stop] for name, array in table(value).items()}
        writer.save(step, networks(value), Held(own.start, part), {"step": step, "stage": "glo"}, score)
    return [writer.wait() for writer in ranks] if wait else None


def rewrite(store, key, data, step=1):
    """Replace a file the way an attacker would: manifest and hash included."""
    folder = f"step-{step:06d}"
    store.write(f"{folder}/a/{key}", data)
    manifest = json.loads(store.read(f"{folder}/manifest.json"))
    manifest["files"][key] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    store.write(f"{folder}/manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_what_one_number_of_workers_wrote_any_other_reads(store, world, readers):
    save(writers(store, world, block_bytes=100), 12)
    assert latest(store) == 12
    for own in ranges(ROWS, readers):
        held = load_rows(store, 12, own)
        assert set(held) == set(table())
        for name, array in table().items():
            np.testing.assert_array_equal(held[name], array[own.start : own.stop])
            assert held[name].dtype == array.dtype


def test_tensors_and_state_come_back_as_they_were(store):
    save(writers(store, 2), 1, value=0.5)
    assert names(store, 1) == ["generator", "generator-ema"]
    for group, tensors in networks(0.5).items():
        held = load_tensors(store, 1, group)
        assert set(held) == set(tensors)
        assert all(torch.equal(held[key], value) and held[key].dtype == value.dtype for key, value in tensors.items())
    assert load_state(store, 1) == {"step": 1, "stage": "glo"}


def test_the_folder_holds_what_the_design_says_and_nothing_else(store):
    save(writers(store, 2), 123)
    assert store.list() == [
        f"step-000123/{name}"
        for name in (
            "a/generator-ema.safetensors",
            "a/generator.safetensors",
            "a/latents-0-12.safetensors",
            "a/latents-12-23.safetensors",
            "a/state.json",
            "manifest.json",
        )
    ]
    manifest = json.loads(store.read("step-000123/manifest.json"))
    for name, file in manifest["files"].items():
        data = store.read(f"step-000123/a/{name}")
        assert file == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_what_changes_after_save_returns_is_not_in_the_checkpoint(store):
    (writer,) = writers(store, 1)
    tensors, part = networks(1.0), table(1.0)
    writer.save(1, tensors, Held(0, part), {})
    tensors["generator"]["fc.weight"].fill_(9)
    part["z"][:] = 9
    writer.wait()
    assert torch.equal(load_tensors(store, 1, "generator")["fc.weight"], torch.full((4, 2), 1.0))
    np.testing.assert_array_equal(load_rows(store, 1, range(ROWS))["z"], table(1.0)["z"])


def test_tied_and_strided_tensors_can_be_saved(store):
    (writer,) = writers(store, 1)
    weight = torch.randn(4, 6)
    writer.save(1, {"generator": {"a": weight, "b": weight, "c": weight.t(), "d": weight[:, ::2]}})
    writer.wait()
    held = load_tensors(store, 1, "generator")
    assert torch.equal(held["b"], weight)
    assert torch.equal(held["c"], weight.t())
    assert torch.equal(held["d"], weight[:, ::2])


def test_a_rank_that_does_not_arrive_is_named(store):
    ranks = writers(store, 4, timeout=0.4)
    part = {name: array[:6] for name, array in table().items()}
    for rank in (0, 2):
        ranks[rank].save(5, latents=Held(6 * rank, part))
    for rank in (0, 2):
        with pytest.raises(EnvironmentFault, match="nothing from rank 1, 3"):
            ranks[rank].wait()
    assert latest(store) is None


def test_the_error_of_a_save_is_raised_by_the_next_one_once(store):
    ranks = writers(store, 2, timeout=0.2)
    ranks[1].save(1, latents=Held(0, table()))
    with pytest.raises(EnvironmentFault, match="rank 0"):
        ranks[1].save(2)
    assert ranks[1].wait() is None


def test_a_torn_checkpoint_is_never_resumed_from_and_removed_at_the_next_start(store):
    save(writers(store, 2), 1)
    ranks = writers(store, 2, timeout=0.1)
    ranks[1].save(2, latents=Held(12, {name: array[12:] for name, array in table().items()}))  # rank 0 was killed
    with pytest.raises(EnvironmentFault):
        ranks[1].wait()
    assert latest(store) == 1
    assert remove_torn(store) == ["step-000002"]
    assert {key.partition("/")[0] for key in store.list()} == {"step-000001"}


def test_a_new_writer_cleans_up_behind_a_killed_one(store):
    store.write("step-000007/old/latents-0-5.safetensors", b"half")
    writer = CheckpointWriter(store, 0, 1, 3, 5.0)
    assert store.list() == []
    save([writer], 7)
    assert latest(store) == 7


def test_parts_of_a_killed_attempt_are_not_taken_for_this_ones(store):
    late = writers(store, 2, attempt="killed", timeout=0.1)[1]
    own = ranges(ROWS, 2)[1]
    late.save(3, latents=Held(own.start, {name: array[own.start :] for name, array in table(100).items()}))
    with pytest.raises(EnvironmentFault):
        late.wait()
    ranks = writers(store, 2, attempt="new", timeout=0.3)
    ranks[0].save(3, latents=Held(0, {name: array[:12] for name, array in table().items()}))
    with pytest.raises(EnvironmentFault, match="rank 1"):
        ranks[0].wait()
    save(writers(store, 2, attempt="newest"), 3)
    np.testing.assert_array_equal(load_rows(store, 3, range(ROWS))["z"], table()["z"])


def test_left_overs_of_another_number_of_workers_do_not_stay(store):
    for rank in range(3):
        store.write(f"step-000004/old/latents-{rank}-{rank + 1}.safetensors", b"old")
        store.write(f"step-000004/old/part-{rank}.json", b'{"attempt":"old","world":3,"files":{}}')
    save(writers(store, 2), 4)
    assert len(store.list("step-000004/a/latents")) == 2
    assert not store.list("step-000004/a/part")
    assert not store.list("step-000004/old")


def test_saving_a_step_again_leaves_it_as_it_is(store):
    save(writers(store, 2), 1, value=1.0)
    save(writers(store, 2, attempt="b"), 1, value=2.0)
    np.testing.assert_array_equal(load_rows(store, 1, range(ROWS))["z"], table(1.0)["z"])


def test_a_damaged_checkpoint_is_saved_anew_when_the_run_comes_by_again(store):
    save(writers(store, 2), 1)
    save(writers(store, 2), 2)
    store.delete("step-000002/a/latents-0-12.safetensors")
    assert latest(store) == 1
    save(writers(store, 2, attempt="b"), 2, value=3.0)
    assert latest(store) == 2
    np.testing.assert_array_equal(load_rows(store, 2, range(ROWS))["z"], table(3.0)["z"])


def folders(store) -> set[int]:
    return {int(match[1]) for key in store.list() if (match := FOLDER.match(key))}


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_and_the_best_are_kept(store, keep):
    ranks = writers(store, 2, keep=keep)
    best = None
    for step, value in enumerate([5.0, 1.0, 3.0, None, 1.5, 9.0], 1):
        found = None if value is None else measured(step, value)
        better = found if found is not None and found.beats(best) else None
        best = better or best
        save(ranks, step, score=lambda better=better: better)
        assert folders(store) == {best.step, *range(max(1, step - keep + 1), step + 1)}
    assert named_best(store) == usable_best(store) == measured(2, 1.0)
    assert find_step(store, "best") == 2
    assert find_step(store, "last") == find_step(store, "6") == find_step(store, "step-000006") == 6


def test_a_score_that_is_still_measured_holds_up_nothing_but_the_next_save(store):
    """The checkpoint is there before its samples are measured: a loss meanwhile costs the measurement alone."""
    [writer], going = writers(store, 1, keep=1), threading.Event()
    save([writer], 1, score=lambda: measured(1, 2.0))
    save([writer], 2, score=lambda: going.wait(20) and measured(2, 1.0), wait=False)
    deadline = time.monotonic() + 20
    while latest(store) != 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (latest(store), named_best(store).step) == (2, 1), "committed, and not yet the best"
    going.set()
    writer.wait()
    assert (named_best(store).step, folders(store)) == (2, {2})


def test_what_was_measured_another_way_is_not_compared():
    lower, higher = measured(1, 5.0), measured(1, 0.5, better="higher", metric="recall_squeezenet")
    assert measured(2, 5.0).beats(lower), "of equals the newest"
    assert not measured(2, 5.1).beats(lower)
    assert measured(2, 0.6, better="higher", metric="recall_squeezenet").beats(higher)
    assert not measured(2, 0.4, better="higher", metric="recall_squeezenet").beats(higher)
    for other in (measured(2, 7.0, samples=200), higher, measured(2, 7.0, better="higher", metric="recall_vgg16")):
        assert other.beats(lower)
    assert lower.beats(None)


def test_a_best_that_is_damaged_or_gone_is_named_and_never_replaced_in_silence(store):
    ranks = writers(store, 2, keep=1)
    save(ranks, 1, score=lambda: measured(1, 2.0))
    for step in (2, 3):
        save(ranks, step)
    store.write("step-000001/a/generator.safetensors", b"short")
    for find in (usable_best, lambda store: find_step(store, "best")):
        with pytest.raises(DamagedCheckpoint, match=r"best checkpoint \(step-000001, fd_squeezenet 2 after .*5 of its"):
            find(store)
    with pytest.raises(DamagedCheckpoint, match="bytes; good ones: 3"):
        find_step(store, "1")
    save(ranks, 4)
    assert folders(store) == {1, 4}, "it is not removed before another one is the best"
    for key in store.list("step-000001/"):
        store.delete(key)
    with pytest.raises(DamagedCheckpoint, match=r"best checkpoint \(step-000001, .*\) is gone"):
        usable_best(store)
    with pytest.raises(UserError, match="no checkpoint of step 1; there are: 4"):
        find_step(store, "step-000001")


def test_while_it_is_unknown_which_is_the_best_none_is_removed(store, caplog):
    ranks = writers(store, 1, keep=1)
    save(ranks, 1, score=lambda: measured(1, 2.0))
    save(ranks, 2)
    store.write("best.json", b'{"step": 1}')
    save(ranks, 3)
    assert folders(store) == {1, 2, 3}
    assert "best.json" in caplog.text
    save(ranks, 4, score=lambda: measured(4, 3.0))
    assert folders(store) == {4}


def test_without_a_measurement_there_is_no_best(store):
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_step(store, "last")
    save(writers(store, 1), 1)
    assert usable_best(store) is None
    with pytest.raises(UserError, match=r"evaluation\.every_epochs"):
        find_step(store, "best")
    for which in ("newest", "step-", "-1", "1.5", "", "../1"):
        with pytest.raises(UserError, match="is no checkpoint: use best, last, or a step"):
            find_step(store, which)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", "1"),
        ("value", "NaN"),
        ("value", None),
        ("metric", "../x"),
        ("metric", "[bold]"),
        ("stage", "a\nb"),
        ("sampler", "x" * 100),
        ("better", "nicer"),
        ("more", 1),
    ],
)
def test_a_hostile_best_is_refused_in_one_line(store, key, value):
    store.write("best.json", json.dumps(measured(1, 2.0).model_dump() | {key: value}).encode())
    with pytest.raises(DamagedCheckpoint) as error:
        named_best(store)
    assert "\n" not in str(error.value)


def test_a_manifest_of_an_earlier_version_is_read(store):
    save(writers(store, 1), 1)
    manifest = json.loads(store.read("step-000001/manifest.json"))
    assert "score" not in manifest
    store.write("step-000001/manifest.json", json.dumps(manifest | {"score": None}).encode())
    assert latest(store) == 1


def test_retention_counts_only_checkpoints_that_can_be_used(store):
    ranks = writers(store, 1, keep=9)
    for step in (1, 2, 3):
        save(ranks, step)
    store.write("step-000003/a/generator.safetensors", b"short")
    assert retain(store, 1) == [1]
    assert latest(store) == 2
    assert retain(store, 0) == []


@pytest.mark.parametrize("name", ["generator.safetensors", "latents-0-12.safetensors", "state.json"])
def test_a_changed_file_is_refused_before_it_is_parsed(store, name):
    save(writers(store, 2), 1)
    data = bytearray(store.read(path(store, name)))
    data[-1] ^= 1
    store.write(path(store, name), bytes(data))
    with pytest.raises(DamagedCheckpoint, match=f"{name} is not what was saved"):
        load_state(store, 1), load_tensors(store, 1, "generator"), load_rows(store, 1, range(5))


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[" * 100_000,
        b"{}",
        b'{"step": 1, "attempt": "a", "rows": 0, "score": null, "files": {"../s.json": {"size": 1, "sha256": "%s"}}}',
        b'{"step": 1, "attempt": "a", "rows": 0, "score": null, "files": {"/etc/passwd": {"size": 1, "sha256": "%s"}}}',
        b'{"step": 1, "attempt": "a", "rows": 0, "score": null, "files": {"state.json": {"size": -1, "sha256": "%s"}}}',
        b'{"step": 1, "attempt": "a", "rows": 0, "score": null, "files": {"state.json": {"size": 1, "sha256": "?"}}}',
        b'{"step": 1, "attempt": "a", "rows": 0, "score": null, "files": {"x.pkl": {"size": 1, "sha256": "%s"}}}',
        b'{"step": 1, "attempt": "../a", "rows": 0, "score": null, "files": {}}',
        b'{"step": 1, "attempt": "", "rows": 0, "score": null, "files": {}}',
        b'{"step": 2, "attempt": "a", "rows": 0, "score": null, "files": {}}',
        b'{"step": 1, "attempt": "a", "rows": 0, "score": null, "files": {}, "more": 1}',
    ],
)
def test_a_hostile_manifest_is_refused_in_one_line(store, manifest):
    store.write("step-000001/manifest.json", manifest.replace(b"%s", b"0" * 64))
    for load in (load_state, names, lambda s, step: load_rows(s, step, range(1))):
        with pytest.raises(UserError) as error:
            load(store, 1)
        assert "\n" not in str(error.value)
    assert latest(store) is None


def header(tensors: dict, body=b"") -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95pickle",
        (2**62).to_bytes(8, "little") + b"{}",
        header({"z": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 8]}}, b"12345678"),
        header({"z": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}, b"12345678"),
        header({"z": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}, b"12345678"),  # too few rows
        header({"z": {"dtype": "F64", "shape": [23], "data_offsets": [0, 184]}}, bytes(184)),  # no such type of ours
        header({"z": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    ],
)
def test_a_hostile_block_of_rows_is_refused_in_one_line(store, data):
    save(writers(store, 1), 1)
    rewrite(store, "latents-0-23.safetensors", data)
    with pytest.raises(UserError) as error:
        load_rows(store, 1, range(5))
    assert "\n" not in str(error.value)


def test_blocks_that_do_not_go_together_are_refused(store):
    save(writers(store, 2), 1)
    data = store.read(path(store, "latents-0-12.safetensors"))
    rewrite(store, "latents-0-11.safetensors", data)
    with pytest.raises(UserError, match="gap or an overlap"):
        load_rows(store, 1, range(ROWS))
    save(writers(store, 2), 2)
    one = header({"z": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]}}, bytes(48))
    rewrite(store, "latents-0-12.safetensors", one, step=2)
    with pytest.raises(UserError, match="blocks before it"):
        load_rows(store, 2, range(ROWS))


def test_rows_that_are_not_there_are_refused(store):
    save(writers(store, 2), 1)
    for rows in (range(20, 24), range(100, 105)):
        with pytest.raises(UserError, match="another data set"):
            load_rows(store, 1, rows)


def test_a_checkpoint_that_is_not_there_is_a_users_error(store):
    for load in (load_state, names):
        with pytest.raises(UserError):
            load(store, 9)


def test_what_json_cannot_hold_is_an_error_and_no_checkpoint(store):
    (writer,) = writers(store, 1)
    writer.save(1, state={"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        writer.wait()
    assert latest(store) is None


def test_each_save_logs_its_bytes_and_seconds(store, caplog):
    with caplog.at_level(logging.INFO, logger="glann.cluster.checkpoints.writer"):
        (report, _) = save(writers(store, 2), 8)
    assert report.step == 8
    assert report.bytes > ROWS
    assert report.seconds > 0
    assert "saved step 8" in caplog.text
    assert "MB" in caplog.text


def test_reading_the_rows_of_an_empty_range_gives_nothing(store):
    save(writers(store, 2), 1)
    assert load_rows(store, 1, range(0)) == {}
