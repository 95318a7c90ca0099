"""Protects a night of training: killed after any request to the store, a run goes on from a whole checkpoint."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from glann.cluster.checkpoints.layout import DamagedCheckpoint, mark_damaged
from glann.cluster.checkpoints.lease import RunTaken
from glann.cluster.checkpoints.reader import load_rows, load_state, load_tensors
from glann.cluster.checkpoints.retention import latest, remove_torn, retain, usable
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.cluster.placement import ranges
from glann.errors import EnvironmentFault, UserError
from glann.storage.local import LocalStore
from held_rows import Held

ROWS = 12


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


class Mortal(LocalStore):
    """A store whose user is killed before its n-th write or removal, or while a stream is half sent."""

    def __init__(self, root, survives: int):
        super().__init__(root)
        self.left = survives

    def _step(self):
        if self.left <= 0:
            raise Killed
        self.left -= 1

    def write(self, key, data, *, only_if_absent=False):
        self._step()
        super().write(key, data, only_if_absent=only_if_absent)

    def delete(self, key):
        self._step()
        super().delete(key)


def save(store, step, world=2, attempt="a", keep=1, timeout=20.0, fence=lambda: None):
    """Save on all ranks. Values tell the step. Ranks are in one process, so one kill takes them all."""
    ranks = [
        CheckpointWriter(store, rank, world, keep, timeout, attempt, block_bytes=64, fence=fence)
        for rank in range(world)
    ]
    for writer, own in zip(ranks, ranges(ROWS, world), strict=True):
        z = np.arange(own.start, own.stop, dtype=np.float32)[:, None] + 100 * step
        tensors = {"generator": {name: torch.full((8,), float(step)) for name in "abcd"}}
        writer.save(step, tensors, Held(own.start, {"z": z}), {"step": step})
    errors = []
    for writer in ranks:
        try:
            writer.wait()
        except BaseException as error:
            errors.append(error)
    return errors


def check_whole(store, step):
    assert load_state(store, step) == {"step": step}
    assert {float(t[0]) for t in load_tensors(store, step, "generator").values()} == {float(step)}
    np.testing.assert_array_equal(load_rows(store, step, range(ROWS))["z"][:, 0], np.arange(ROWS) + 100 * step)


def history(store):
    """What a run does: two saves with retention of one, then cleaning up and a third, as after a restart."""
    for step, attempt in ((1, "a"), (2, "a"), (3, "b")):
        if attempt == "b":
            remove_torn(store)
        errors = save(store, step, attempt=attempt, timeout=0.4)
        if any(isinstance(error, Killed) for error in errors):
            raise Killed
        if errors:
            raise errors[0]


def test_killed_after_any_number_of_store_operations_the_newest_committed_checkpoint_is_whole(tmp_path):
    seen = []
    for survived in itertools.count():
        folder = tmp_path / str(survived)
        try:
            history(Mortal(folder, survived))
            finished = True
        except Killed:
            finished = False
        store = LocalStore(folder)
        newest = latest(store)
        if newest is not None:
            check_whole(store, newest)
        seen.append(newest or 0)
        # The next start cleans up, which loses nothing, and saves.
        remove_torn(store)
        assert latest(store) == newest
        assert save(store, 9, attempt="next") == []
        assert latest(store) == 9
        check_whole(store, 9)
        assert {key.partition("/")[0] for key in store.list()} == {"step-000009"}
        if finished:
            break
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 3}
    assert len(seen) > 30


def test_a_step_that_another_writer_damaged_or_left_half_done_is_saved_whole(tmp_path):
    """The files of two attempts never mix, whenever the first one was killed."""
    for survived in itertools.count():
        folder = tmp_path / str(survived)
        errors = save(Mortal(folder, survived), 5, attempt="first", timeout=0.4)
        store = LocalStore(folder)
        save(store, 5, world=3, attempt="second")
        check_whole(store, 5)
        remove_torn(store)
        check_whole(store, 5)
        if not errors:
            break


def test_a_writer_that_lost_its_lease_commits_nothing_and_removes_nothing(tmp_path):
    store = LocalStore(tmp_path)
    assert save(store, 1) == []
    asked = []

    def fence():
        asked.append(1)
        if len(asked) > 1:  # it was lost while the files were being sent
            raise RunTaken("taken over")

    errors = save(store, 2, fence=fence, timeout=0.4)
    assert any(isinstance(error, RunTaken) for error in errors)
    assert latest(store) == 1
    with pytest.raises(RunTaken):
        CheckpointWriter(store, 0, 1, 1, 1.0, fence=fence)
    assert store.list("step-000002/a/latents")


@pytest.mark.parametrize("moment", ["part-1.json", "manifest.json"])
def test_of_two_writers_of_one_step_that_do_not_know_each_other_one_commits(tmp_path, moment):
    store = LocalStore(tmp_path)

    class Late(LocalStore):
        """Another writer commits the step while this one sends its files, or just before it would commit."""

        def write(self, key, data, *, only_if_absent=False):
            if key.endswith(moment):
                save(store, 4, world=3, attempt="other")
            super().write(key, data, only_if_absent=only_if_absent)

    errors = save(Late(tmp_path), 4, attempt="this", timeout=5.0)
    assert [str(error) for error in errors if "another command" in str(error)]
    check_whole(store, 4)
    assert not store.list("step-000004/this/part-0")


def test_a_commit_whose_answer_was_lost_counts(tmp_path):
    class Repeating(LocalStore):
        """As a client that repeats a request to which no answer came."""

        def write(self, key, data, *, only_if_absent=False):
            super().write(key, data, only_if_absent=only_if_absent)
            if only_if_absent:
                super().write(key, data, only_if_absent=True)

    assert save(Repeating(tmp_path), 4) == []
    check_whole(LocalStore(tmp_path), 4)


def test_what_was_not_stored_as_it_was_sent_is_not_committed(tmp_path):
    class Losing(LocalStore):
        """Says that it stored everything, and did not."""

        def write(self, key, data, *, only_if_absent=False):
            if key.endswith("latents-0-6.safetensors"):
                list(data)
            else:
                super().write(key, data, only_if_absent=only_if_absent)

    errors = save(Losing(tmp_path), 1, timeout=0.4)
    told = "step 1 was not stored as it was sent: .*latents-0-6.safetensors is missing"
    assert any(re.search(told, str(error)) for error in errors)
    assert latest(LocalStore(tmp_path)) is None


def flip(store, key):
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.write(key, bytes(data))


def test_a_rank_that_gives_up_just_when_the_parts_go_may_still_try_again(tmp_path):
    class Removing(LocalStore):
        """Rank 0 removes the parts between the listing of them and the reading."""

        def list(self, prefix=""):
            keys = super().list(prefix)
            for key in keys:
                self.delete(key)
            return keys

    writer = CheckpointWriter(Removing(tmp_path), 1, 2, 1, timeout=0.05, attempt="a")
    writer.save(1, {"generator": {"a": torch.ones(8)}})
    with pytest.raises(EnvironmentFault, match="saving step 1 timed out"):  # not MissingObject, which would end the run
        writer.wait()


def test_a_damaged_file_is_found_by_loading_and_an_older_checkpoint_stays_usable(tmp_path):
    store = LocalStore(tmp_path)
    for step in (1, 2, 3):
        save(store, step, keep=3)
    flip(store, next(key for key in store.list("step-000003/a/latents")))
    assert usable(store) == ([3, 2, 1], {})  # at first sight it looks whole
    with pytest.raises(DamagedCheckpoint, match=r"step-000003/a/latents-.* is not what was saved") as error:
        load_rows(store, 3, range(ROWS))
    mark_damaged(store, 3, str(error.value))
    steps, damaged = usable(store)
    assert steps == [2, 1]
    assert "latents-" in damaged[3]
    assert latest(store) == 2
    assert remove_torn(store) == []
    assert retain(store, 1) == [1]
    assert latest(store) == 2
    # The run comes by again: it is saved anew and not taken for saved already.
    assert save(store, 3, attempt="b", keep=3) == []
    check_whole(store, 3)
    assert usable(store) == ([3, 2], {})


def test_damaged_ones_never_push_out_the_last_good_one(tmp_path):
    store = LocalStore(tmp_path)
    for step in (1, 2, 3):
        save(store, step, keep=3)
    mark_damaged(store, 2, "x")
    store.delete("step-000003/a/state.json")
    assert retain(store, 1) == []
    assert latest(store) == 1
    check_whole(store, 1)
    save(store, 4, keep=1)
    assert {key.partition("/")[0] for key in store.list()} == {"step-000004"}


def test_a_run_never_begins_anew_over_checkpoints_that_cannot_be_used(tmp_path):
    store = LocalStore(tmp_path)
    assert usable(store) == ([], {})
    save(store, 1)
    store.delete("step-000001/a/state.json")
    with pytest.raises(
        UserError, match=r"no checkpoint of .* can be used: .*state.json is missing; restore it"
    ) as error:
        usable(store)
    assert "\n" not in str(error.value)


def test_a_hostile_note_of_damage_is_one_line(tmp_path):
    store = LocalStore(tmp_path)
    save(store, 1)
    for note in (b"", b"[" * 100_000, b'{"reason": "a\\nb"}', b'{"reason": 1}', b'{"more": 1}'):
        store.write("step-000001/damaged.json", note)
        with pytest.raises(UserError) as error:
            usable(store)
        assert "\n" not in str(error.value)
