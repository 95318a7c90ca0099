"""The loader: exactly the plan, decoded ahead; bad rows are counted; nothing is left running."""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from glann.datasets import loader
from glann.datasets.cache import ShardCache
from glann.datasets.loader import BadRows, PlannedBatch, batches
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.errors import EnvironmentFault, UserError
from glann.storage.local import LocalStore

ROWS = 53


@pytest.fixture
def packed(tmp_path):
    """A data set of random RGB images, and its pixels."""
    img_NHWC = np.random.default_rng(6).integers(0, 256, (ROWS, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "source.npz", images=img_NHWC)
    pack(str(tmp_path / "source.npz"), str(tmp_path / "set"), resolution=16, shard_size_mb=0.02)
    return ImageRows(str(tmp_path / "set"), memory_mb=0), img_NHWC.transpose(0, 3, 1, 2)


def plan_of(rows, batch):
    """Batches of `rows` in order, the last one padded with rows of weight zero."""
    rows = np.asarray(rows, np.int64)
    for step, start in enumerate(range(0, len(rows), batch)):
        part = rows[start : start + batch]
        padding = batch - len(part)
        weight_B = np.concatenate([np.ones(len(part)), np.zeros(padding)]).astype(np.float32)
        yield PlannedBatch(step, np.pad(part, (0, padding)), weight_B)


def run(images, plan, threads=2, prefetch=3, max_bad=None):
    return batches(images, plan, threads=threads, prefetch=prefetch, max_bad=max_bad or BadRows(0, ROWS))


def decoding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("glann-decode")]


@pytest.mark.parametrize(("threads", "prefetch", "batch"), [(1, 1, 8), (3, 4, 8), (4, 64, 7), (5, 2, 1), (2, 2, 64)])
def test_the_order_is_that_of_the_plan(packed, threads, prefetch, batch):
    images, img_NCHW = packed
    rows = np.random.default_rng(threads).permutation(ROWS)
    seen = []
    for planned, got in zip(plan_of(rows, batch), run(images, plan_of(rows, batch), threads, prefetch), strict=True):
        assert got.step == planned.step
        np.testing.assert_array_equal(got.rows_B, planned.rows_B)
        np.testing.assert_array_equal(got.weight_B, planned.weight_B)
        real_B = planned.weight_B > 0
        np.testing.assert_array_equal(got.img_BCHW.numpy()[real_B], img_NCHW[planned.rows_B[real_B]])
        assert not got.img_BCHW.numpy()[~real_B].any()
        seen += got.rows_B.numpy()[real_B].tolist()
    assert seen == rows.tolist()


def test_types_and_shapes(packed):
    batch = next(run(packed[0], plan_of(range(8), 8)))
    assert (batch.rows_B.dtype, batch.img_BCHW.dtype, batch.weight_B.dtype) == (torch.int64, torch.uint8, torch.float32)
    assert batch.img_BCHW.shape == (8, 3, 16, 16)
    assert batch.img_BCHW.is_contiguous()


def test_batches_of_padding_only_and_of_nothing_pass(packed):
    plan = [
        PlannedBatch(0, np.zeros(4, np.int64), np.zeros(4, np.float32)),
        PlannedBatch(1, np.zeros(0, np.int64), np.zeros(0, np.float32)),
    ]
    first, second = run(packed[0], plan)
    assert not first.img_BCHW.any()
    assert second.img_BCHW.shape == (0, 3, 16, 16)
    assert list(run(packed[0], [])) == []


def test_batches_are_decoded_while_the_caller_works(packed, monkeypatch):
    images, _ = packed
    decoded, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda row: decoded.append(row) or decode(row))
    iterator = run(images, plan_of(range(48), 8), prefetch=3)
    next(iterator)
    deadline = time.monotonic() + 30
    while len(decoded) < 32 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert sorted(decoded) == list(range(32))  # the batch in hand and three more, and no further
    iterator.close()


def test_closing_early_leaves_no_threads(packed):
    iterator = run(packed[0], plan_of(range(ROWS), 4), threads=4)
    next(iterator)
    assert decoding_threads()
    iterator.close()
    assert not decoding_threads()


def test_dropping_the_iterator_leaves_no_threads(packed):
    iterator = run(packed[0], plan_of(range(ROWS), 4), threads=4)
    next(iterator)
    del iterator
    gc.collect()
    assert not decoding_threads()


def test_an_error_reaches_the_caller_at_its_batch_and_leaves_no_threads(packed, monkeypatch):
    images, _ = packed
    decode = images.decode

    def broken(row):
        if row == 20:
            raise EnvironmentFault("storage is gone")
        return decode(row)

    monkeypatch.setattr(images, "decode", broken)
    iterator = run(images, plan_of(range(ROWS), 8))
    assert [next(iterator).step, next(iterator).step] == [0, 1]
    with pytest.raises(EnvironmentFault, match="storage is gone"):
        next(iterator)
    assert not decoding_threads()


def test_an_error_in_the_plan_reaches_the_caller(packed):
    def plan():
        yield from plan_of(range(8), 8)
        raise ValueError("bad plan")

    with pytest.raises(ValueError, match="bad plan"):
        list(run(packed[0], plan()))
    assert not decoding_threads()


def damage(images, rows):
    """Flip a bit of each of these rows in their shards."""
    for row in rows:
        shard = images.index.shards[images.index.shard_of(row)].file
        data = bytearray(images._store.read(shard))
        data[int(images.index.records_N["offset"][row]) + 30] ^= 1
        images._store.write(shard, bytes(data))


def test_a_corrupt_image_is_named_and_stops_the_run(packed):
    images, _ = packed
    damage(images, [11])
    with pytest.raises(UserError, match=r"row 11, .*set-00000\d.tar: 000000011.png.*max_bad_fraction=0"):
        list(run(images, plan_of(range(ROWS), 8)))


def test_corrupt_images_get_weight_zero_up_to_the_allowed_share(packed, caplog):
    images, img_NCHW = packed
    damage(images, [11, 40])
    max_bad = BadRows(2 / ROWS, ROWS)
    for _ in range(2):  # the same rows in another epoch are not counted again
        for batch in run(images, plan_of(range(ROWS), 8), max_bad=max_bad):
            for row, image, weight in zip(batch.rows_B.tolist(), batch.img_BCHW, batch.weight_B, strict=True):
                if row in (11, 40):
                    assert weight == 0
                    assert not image.any()
                elif weight:
                    np.testing.assert_array_equal(image, img_NCHW[row])
    assert max_bad.rows == [11, 40]
    assert caplog.text.count("skipped") == 2
    damage(images, [5])
    with pytest.raises(UserError, match="3 bad images"):
        list(run(images, plan_of(range(ROWS), 8), max_bad=max_bad))


def test_the_plan_is_not_changed_by_a_corrupt_image(packed):
    images, _ = packed
    damage(images, [0])
    planned = next(plan_of(range(8), 8))
    list(run(images, [planned], max_bad=BadRows(1.0, ROWS)))
    assert planned.weight_B.tolist() == [1] * 8


class Slow(LocalStore):
    """Plays object storage: a request ends when so many are in flight, or has failed when they never are."""

    def __init__(self, root, at_once):
        super().__init__(root)
        self.barrier, self.requests, self.in_flight, self.most = threading.Barrier(at_once), 0, 0, 0
        self.lock = threading.Lock()

    def read_range(self, key, offset, length):
        with self.lock:
            self.requests, self.in_flight = self.requests + 1, self.in_flight + 1
            self.most = max(self.most, self.in_flight)
        try:
            self.barrier.wait(timeout=20)
            return super().read_range(key, offset, length)
        finally:
            with self.lock:
                self.in_flight -= 1


@pytest.fixture
def remote(packed, tmp_path):
    """The same data set in object storage, with a cache without room: every image is a request of its own."""
    images, img_NCHW = packed

    def behind(at_once, memory_mb=0):
        store, read = Slow(images._store.root, at_once), ImageRows(str(images._store.root), memory_mb=memory_mb)
        read._cache = ShardCache(store, tmp_path / "cache", 0)
        return read, store

    return behind, img_NCHW


def test_requests_in_flight_are_not_bound_to_the_threads_that_decode(remote):
    """One thread decodes; a request returns only when those of two whole batches wait."""
    behind, img_NCHW = remote
    images, store = behind(16)
    rows = np.random.default_rng(1).permutation(ROWS)[:48]
    for planned, got in zip(plan_of(rows, 8), run(images, plan_of(rows, 8), threads=1, prefetch=2), strict=True):
        np.testing.assert_array_equal(got.img_BCHW.numpy(), img_NCHW[planned.rows_B])
    assert store.requests == 48
    assert store.most == 16


def test_requests_in_flight_are_bounded(remote, monkeypatch):
    monkeypatch.setattr(loader, "READS", 5)
    images, store = remote[0](5)
    assert len(list(run(images, plan_of(range(50), 10), threads=2, prefetch=4))) == 5
    assert (store.requests, store.most) == (50, 5)


def test_images_that_are_decoded_already_are_not_requested_again(remote):
    behind, img_NCHW = remote
    images, store = behind(1, memory_mb=256)
    for _ in range(3):
        seen = torch.cat([got.img_BCHW for got in run(images, plan_of(range(52), 4))])
        np.testing.assert_array_equal(seen.numpy(), img_NCHW[:52])
    assert store.requests == 52


def test_a_bad_row_and_a_lost_server_are_met_where_they_belong_also_when_reading_ahead(remote):
    images, _ = remote[0](1)
    images.index.records  # noqa: B018 - read before the store fails
    good = images.read

    def read(row):
        if row == 30:
            raise EnvironmentFault("the server is gone")
        if row == 5:
            raise images._corrupt(row, "damaged")
        return good(row)

    images.read = read
    bad = BadRows(0.1, ROWS)
    stream = run(images, plan_of(range(40), 8), threads=2, prefetch=2, max_bad=bad)
    first = next(stream)
    assert first.weight_B.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert [next(stream).step, next(stream).step] == [1, 2]
    with pytest.raises(EnvironmentFault, match="the server is gone"):
        next(stream)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("glann-decode", "glann-read"))]
