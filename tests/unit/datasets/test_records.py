"""Protects the index of a large data set: a worker reads and holds the records of its own rows, all of them checked."""

from __future__ import annotations

import hashlib
import json
import threading
import tracemalloc

import numpy as np
import pytest
from glann.cluster.placement import ranges
from glann.datasets import index as index_file
from glann.datasets.index import Index, Shard, build
from glann.datasets.records import BLOCK_ROWS, RECORD, Records
from glann.errors import UserError

HASH = "0" * 64
HEADER = {"name": "set", "resolution": 32, "channels": 3, "image_format": "png", "recipe": HASH}


class CountingStore:
    """The two files of an index, and how many bytes of the records were read."""

    url = "s3://bucket/set"

    def __init__(self, header: bytes, records: bytes):
        self.objects = {"index.json": header, "images.bin": records}
        self.read_bytes, self.requests = 0, 0

    def size(self, key):
        return len(self.objects[key])

    def read(self, key):
        if key == "images.bin":
            self.read_bytes += self.size(key)
        return self.objects[key]

    def read_range(self, key, offset, length):
        self.read_bytes, self.requests = self.read_bytes + length, self.requests + 1
        return self.objects[key][offset : offset + length]


def made(rows: int, per_shard: int = 90) -> tuple[bytes, bytes]:
    records = np.zeros(rows, RECORD)
    records["offset"] = 512 + 1024 * (np.arange(rows) % per_shard)
    records["length"] = 300
    records["sha256"][:, :4] = np.arange(rows, dtype="<u4")[:, None].view(np.uint8)
    counts = [min(per_shard, rows - start) for start in range(0, rows, per_shard)]
    shards = [
        Shard(file=f"s-{number:06d}.tar", rows=count, bytes=1024 * (count + 1), sha256=HASH)
        for number, count in enumerate(counts)
    ]
    return build(shards=shards, records=records.tobytes(), **HEADER)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(index_file, "BLOCK_ROWS", 100)


def test_every_worker_reads_the_blocks_of_its_own_rows(small_blocks):
    header, records = made(1003)
    expected = np.frombuffer(records, RECORD)
    for world in (1, 3, 7):
        for own in ranges(1003, world):
            store = CountingStore(header, records)
            index = Index.load_from(store)
            assert store.read_bytes == 0
            for row in own:
                assert index.records[row] == expected[row]
            blocks = (own.stop - 1) // 100 - own.start // 100 + 1
            assert store.requests == blocks
            assert store.read_bytes <= min(1003, 100 * blocks) * RECORD.itemsize
    assert np.array_equal(index.records_N, expected)


def test_a_damaged_block_is_refused_where_it_is_used_and_the_others_are_read(small_blocks):
    header, records = made(1003)
    damaged = bytearray(records)
    damaged[250 * RECORD.itemsize + 13] ^= 1
    index = Index.load_from(CountingStore(header, bytes(damaged)))
    assert index.records[199]["length"] == index.records[300]["length"] == 300
    for row in (200, 250, 299):
        with pytest.raises(UserError, match=r"images\.bin is damaged \(wrong SHA-256\); copy or pack"):
            index.records[row]


def test_records_that_lie_outside_their_shard_are_refused_in_every_block(small_blocks):
    _, records = made(1003)
    wrong = np.frombuffer(records, RECORD).copy()
    wrong["offset"][405] = 1 << 40
    shards = [Shard(file=f"s-{n:06d}.tar", rows=c, bytes=1 << 20, sha256=HASH) for n, c in enumerate([90] * 11 + [13])]
    header, records = build(shards=shards, records=wrong.tobytes(), **HEADER)
    index = Index.load_from(CountingStore(header, records))
    assert index.records[399]
    with pytest.raises(UserError, match="row 405 does not lie inside its shard"):
        index.records[400]


def test_a_header_with_the_wrong_number_of_hashes_is_refused(small_blocks):
    header, records = made(1003)
    tree = json.loads(header)
    tree["blocks"] = tree["blocks"][:-1]
    tree["fingerprint"] = index_file._fingerprint(tree)
    with pytest.raises(UserError, match="it has 10 hashes of blocks"):
        Index.load_from(CountingStore(json.dumps(tree).encode(), records))


def test_the_fingerprint_covers_the_blocks(small_blocks):
    """A run is resumed with the images that it was begun with, also where no process reads all their hashes."""
    header, records = made(1003)
    tree = json.loads(header)
    tree["blocks"][3] = "1" * 64
    with pytest.raises(UserError, match="was changed"):
        Index.load_from(CountingStore(json.dumps(tree).encode(), records))


def test_a_data_set_of_one_block_is_written_as_before():
    """Glann 0.1 reads it, and its runs resume with it packed anew."""
    tree = json.loads(made(1003)[0])
    assert "blocks" not in tree
    assert tree["fingerprint"] == index_file._fingerprint(tree | {"blocks": None})


def test_threads_read_a_block_once():
    read, start = [], threading.Barrier(8)

    def block(number: int) -> np.ndarray:
        read.append(number)
        return np.full(10, number)

    records = Records(95, 10, block)
    found: list[int] = []

    def work() -> None:
        start.wait()
        found.extend(int(records[row]) for row in range(95))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == list(range(10))
    assert sorted(found) == sorted([row // 10 for row in range(95)] * 8)


def test_one_of_1024_workers_opens_100_million_rows_in_megabytes():
    """All blocks of this data set have the same bytes, so that it need not exist. Whole, its records take 4.4 GB."""
    blocks = 1526
    rows = blocks * BLOCK_ROWS
    block = np.zeros(BLOCK_ROWS, RECORD)
    block["offset"], block["length"] = 512 + 1024 * np.arange(BLOCK_ROWS), 300
    data = block.tobytes()
    shard = {"rows": BLOCK_ROWS, "bytes": 1024 * (BLOCK_ROWS + 1), "sha256": HASH}
    tree = {"format": "glann-images", "version": 1, **HEADER, "rows": rows, "images_sha256": HASH}
    tree["shards"] = [{"file": f"s-{number:06d}.tar"} | shard for number in range(blocks)]
    tree["blocks"] = [hashlib.sha256(data).hexdigest()] * blocks
    tree["fingerprint"] = index_file._fingerprint(tree)
    store = CountingStore(json.dumps(tree).encode(), b"")
    store.size = lambda key: rows * RECORD.itemsize if key == "images.bin" else len(store.objects[key])

    def read_range(key, offset, length):
        store.read_bytes += length
        return data

    store.read_range = read_range
    own = ranges(rows, 1024)[701]
    tracemalloc.start()
    index = Index.load_from(store)
    for row in (own.start, own.stop - 1):
        assert index.records[row]["offset"] == 512 + 1024 * (row % BLOCK_ROWS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{rows:,} rows: {store.read_bytes / 1e6:.1f} MB read, {peak / 1e6:.1f} MB of memory")
    assert index.rows == rows > 100_000_000
    assert store.read_bytes <= 3 * len(data)
    assert peak < 40e6


def test_an_index_travels_to_another_process(small_blocks):
    """Ray carries it to the trials of a study that share a stage 1."""
    from ray import cloudpickle

    records_N = np.zeros(5, RECORD)
    records_N["offset"] = range(5)
    for records in (Records.loaded(records_N), Records(5, 2, lambda number: records_N[2 * number : 2 * number + 2])):
        assert records[1]["offset"] == 1, "some may be in memory already"
        again = cloudpickle.loads(cloudpickle.dumps(records))
        assert [again[row]["offset"] for row in range(5)] == list(range(5))
