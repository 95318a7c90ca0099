"""What an unfinished pack keeps grows with its shards, not with their square; a resumed one reads no shard again."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from glann.datasets import pack as packing
from glann.datasets.pack import pack
from glann.errors import UserError
from glann.storage.base import MissingObject, ObjectExists

IMAGES = 240
OPTIONS = {"resolution": 16, "channels": 1, "name": "set"}


class Bucket:
    """An object store in memory that counts requests, and the bytes that are written and read, by kind of file."""

    def __init__(self):
        self.url, self.kept = "s3://bucket/set", {}
        self.requests, self.written, self.received = Counter(), Counter(), Counter()

    def _kind(self, key):
        return key.rpartition(".")[2]

    def read(self, key):
        self.requests["get"] += 1
        if key not in self.kept:
            raise MissingObject(key)
        self.received[self._kind(key)] += len(self.kept[key])
        return self.kept[key]

    def read_range(self, key, offset, length):
        self.requests["get"] += 1
        return self.kept[key][offset : offset + length]

    def write(self, key, data, *, only_if_absent=False):
        self.requests["put"] += 1
        if only_if_absent and key in self.kept:
            raise ObjectExists(key)
        if not isinstance(data, bytes):
            data = data.read_bytes() if hasattr(data, "read_bytes") else b"".join(data)
        self.kept[key] = data
        self.written[self._kind(key)] += len(data)

    def download(self, key, path):
        path.write_bytes(self.read(key))

    def sizes(self, prefix=""):
        self.requests["list"] += 1
        return {key: len(self.kept[key]) for key in sorted(self.kept) if key.startswith(prefix)}

    def list(self, prefix=""):
        return list(self.sizes(prefix))

    def exists(self, key):
        self.requests["head"] += 1
        return key in self.kept

    def delete(self, key):
        self.requests["delete"] += 1
        self.kept.pop(key, None)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    source = tmp_path / "noise.npz"
    np.savez(source, images=np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16), np.uint8))
    store = Bucket()
    monkeypatch.setattr(packing, "open_store", lambda url, s3=None: store)
    store.source = str(source)
    return store


def interrupted(bucket, at, size):
    def interrupt(done, total):
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(bucket.source, bucket.url, progress=interrupt, shard_size_mb=size, **OPTIONS)


@pytest.mark.parametrize(("size", "shards"), [(0.02, 10), (0.004, 70)])
def test_what_is_kept_of_the_finished_shards_grows_with_their_number(bucket, size, shards):
    interrupted(bucket, IMAGES, size)
    finished = sum(key.endswith(".tar") for key in bucket.kept)
    assert finished > shards
    entries = {key: len(data) for key, data in bucket.kept.items() if key.endswith(".packed")}
    assert len(entries) == finished
    records = 44 * (IMAGES - 1)
    assert bucket.written["packed"] == sum(entries.values()) < records + 400 * finished
    assert bucket.written["json"] < 200  # packing.json, once


def test_a_resumed_pack_reads_what_was_kept_and_no_shard(bucket):
    interrupted(bucket, IMAGES, 0.004)
    finished = sum(key.endswith(".tar") for key in bucket.kept)
    bucket.requests.clear(), bucket.received.clear()
    index = pack(bucket.source, bucket.url, shard_size_mb=0.004, **OPTIONS)
    assert bucket.received["tar"] == 0
    assert bucket.requests["get"] <= finished + 2
    assert bucket.requests["list"] <= 3
    resumed, bucket.kept = bucket.kept, {}
    assert pack(bucket.source, bucket.url, shard_size_mb=0.004, **OPTIONS).fingerprint == index.fingerprint
    assert resumed == bucket.kept  # neither packing.json nor an entry is left
    assert {key.rpartition(".")[2] for key in resumed} == {"tar", "bin", "json"}


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: None], ids=["shorter", "missing"])
def test_a_shard_of_another_size_is_refused(bucket, change):
    interrupted(bucket, IMAGES, 0.004)
    data = change(bucket.kept.pop("set-000002.tar"))
    bucket.kept |= {"set-000002.tar": data} if data else {}
    with pytest.raises(UserError, match=r"set-000002\.tar is damaged"):
        pack(bucket.source, bucket.url, shard_size_mb=0.004, **OPTIONS)
