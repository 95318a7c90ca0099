"""Reading rows: nothing but the bytes that were packed is ever returned, and the S3 cache stays within its bound."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from glann.datasets import cache as cache_module
from glann.datasets.cache import ShardCache
from glann.datasets.pack import pack
from glann.datasets.reader import CorruptImage, ImageRows
from glann.errors import UserError
from glann.storage.local import LocalStore

ROWS = 60


@pytest.fixture
def packed(tmp_path):
    """A data set of random 16 px images in several shards, and its pixels."""
    img_NHW = np.random.default_rng(5).integers(0, 256, (ROWS, 16, 16), np.uint8)
    np.savez(tmp_path / "source.npz", images=img_NHW)
    pack(str(tmp_path / "source.npz"), str(tmp_path / "set"), resolution=16, channels=1, shard_size_mb=0.012)
    return tmp_path / "set", img_NHW


class Remote(LocalStore):
    """A folder that plays the remote store and counts what is asked of it."""

    def __init__(self, root):
        super().__init__(root)
        self.requests = []

    def read_range(self, key, offset, length):
        self.requests.append((key, offset, length))
        return super().read_range(key, offset, length)


def cached(place, folder, limit=1 << 30):
    """A reader of `place` through a cache, as for S3, and its store."""
    images, store = ImageRows(str(place), memory_mb=0), Remote(place)
    images._cache = ShardCache(store, folder, limit)
    return images, store


def test_every_row_comes_back(packed):
    place, img_NHW = packed
    images = ImageRows(str(place))
    assert len(images) == ROWS
    assert len(images.index.shards) > 2
    for row in np.random.default_rng(0).permutation(ROWS):
        img_CHW = images.decode(int(row))
        assert img_CHW.shape == (1, 16, 16)
        np.testing.assert_array_equal(img_CHW[0], img_NHW[row])


def test_only_the_first_rows_are_used(packed):
    images = ImageRows(str(packed[0]), max_rows=7)
    assert len(images) == 7
    with pytest.raises(IndexError):
        images.decode(7)
    assert len(ImageRows(str(packed[0]), max_rows=10**6)) == ROWS


def test_a_small_data_set_is_decoded_once(packed, monkeypatch):
    place, img_NHW = packed
    images, again = ImageRows(str(place)), ImageRows(str(place), memory_mb=0)
    read = []
    for reader in (images, again):
        monkeypatch.setattr(reader, "read", lambda row, plain=reader.read: read.append(row) or plain(row))
        for row in (4, 2, 4, 4):
            np.testing.assert_array_equal(reader.decode(row)[0], img_NHW[row])
    assert read == [4, 2, 4, 2, 4, 4]


def test_a_row_that_does_not_exist_is_refused(packed):
    for memory_mb in (0, 256):
        for row in (-1, ROWS):
            with pytest.raises(IndexError):
                ImageRows(str(packed[0]), memory_mb=memory_mb).decode(row)


def test_a_flipped_bit_is_named(packed):
    place, _ = packed
    images = ImageRows(str(place))
    shard = place / images.index.shards[0].file
    data = bytearray(shard.read_bytes())
    data[int(images.index.records_N["offset"][3]) + 40] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CorruptImage, match=rf"row 3, .*{shard.name}: 000000003.png: ") as error:
        images.decode(3)
    assert error.value.row == 3
    images.decode(4)


def test_a_truncated_shard_is_named(packed):
    place, _ = packed
    images = ImageRows(str(place))
    with open(place / images.index.shards[0].file, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptImage, match="the shard is truncated"):
        images.decode(2)


def test_a_missing_shard_is_one_line(packed):
    place, _ = packed
    images = ImageRows(str(place))
    (place / images.index.shards[0].file).unlink()
    with pytest.raises(UserError, match=r"lacks set-000000\.tar"):
        images.decode(0)


def test_what_is_cached_is_not_asked_for_again(packed, tmp_path):
    place, img_NHW = packed
    images, store = cached(place, tmp_path / "cache")
    for _ in range(2):
        for row in range(ROWS):
            np.testing.assert_array_equal(images.decode(row)[0], img_NHW[row])
    assert len(store.requests) == len(images.index.shards)  # these shards are smaller than a block


def test_a_row_across_blocks_comes_back(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 1000)
    place, img_NHW = packed
    images, _ = cached(place, tmp_path / "cache")
    for row in np.random.default_rng(1).permutation(ROWS):
        np.testing.assert_array_equal(images.decode(int(row))[0], img_NHW[row])


def test_a_damaged_cache_is_mended(packed, tmp_path):
    place, img_NHW = packed
    images, _ = cached(place, tmp_path / "cache")
    images.decode(0)
    file = tmp_path / "cache" / f"{images.index.shards[0].sha256}.shard"
    for damage in (bytes(file.stat().st_size), b"", b"x" * 700):
        file.write_bytes(damage)
        np.testing.assert_array_equal(images.decode(0)[0], img_NHW[0])


def test_what_arrives_damaged_is_neither_returned_nor_cached(packed, tmp_path):
    place, img_NHW = packed
    images, store = cached(place, tmp_path / "cache")
    whole = store.read(images.index.shards[0].file)
    store.write(images.index.shards[0].file, bytes(len(whole)))
    with pytest.raises(CorruptImage):
        images.decode(0)
    store.write(images.index.shards[0].file, whole)
    np.testing.assert_array_equal(images.decode(0)[0], img_NHW[0])


def used(folder):
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))


def test_the_cache_keeps_to_its_bound_and_every_row_still_comes(packed, tmp_path):
    place, img_NHW = packed
    limit = 2 * max(shard.bytes for shard in ImageRows(str(place)).index.shards) + 5000
    images, store = cached(place, tmp_path / "cache", limit)
    for row in np.random.default_rng(2).permutation(ROWS):
        np.testing.assert_array_equal(images.decode(int(row))[0], img_NHW[row])
        assert used(tmp_path / "cache") <= limit
    assert any(length < 2000 for _, _, length in store.requests)  # single images, where a block found no room


def test_files_out_of_use_make_room_oldest_first_and_files_in_use_stay(packed, tmp_path):
    place, _ = packed
    (tmp_path / "cache").mkdir()
    for name, age in (("old", 7200), ("older", 9000), ("used", 30)):
        path = tmp_path / "cache" / f"{name}.shard"
        path.write_bytes(os.urandom(40_960))
        then = path.stat().st_mtime - age
        os.utime(path, (then, then))
    images, _ = cached(place, tmp_path / "cache", 3 * 40_960 + 1000)
    images.decode(0)
    names = {path.stem for path in (tmp_path / "cache").glob("*.shard")}
    assert names == {"old", "used", images.index.shards[0].sha256}


def test_a_full_disk_only_stops_the_caching(packed, tmp_path, monkeypatch, caplog):
    place, img_NHW = packed
    images, _ = cached(place, tmp_path / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "pwrite", full)
    np.testing.assert_array_equal(images.decode(0)[0], img_NHW[0])
    assert "continuing without caching" in caplog.text


def test_many_threads_read_through_one_cache(packed, tmp_path):
    place, img_NHW = packed
    images, store = cached(place, tmp_path / "cache")
    wrong = []

    def read(seed):
        rows = np.random.default_rng(seed).permutation(ROWS)
        wrong.extend(row for row in rows if not np.array_equal(images.decode(int(row))[0], img_NHW[row]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store.requests) == len(images.index.shards)


def test_several_processes_share_one_cache(packed, tmp_path):
    place, _ = packed
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from glann.datasets.cache import ShardCache\n"
        "from glann.datasets.reader import ImageRows\n"
        "from glann.storage.local import LocalStore\n"
        "images = ImageRows(sys.argv[1], memory_mb=0)\n"
        "images._cache = ShardCache(LocalStore(sys.argv[1]), Path(sys.argv[2]), 40_000)\n"
        "want = np.load(sys.argv[3])['images']\n"
        "for row in np.random.default_rng(int(sys.argv[4])).permutation(len(images)):\n"
        "    np.testing.assert_array_equal(images.decode(int(row))[0], want[row])\n"
    )
    arguments = [str(place), str(tmp_path / "cache"), str(tmp_path / "source.npz")]
    started = [subprocess.Popen([sys.executable, "-c", program, *arguments, str(seed)]) for seed in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert used(tmp_path / "cache") <= 40_000
