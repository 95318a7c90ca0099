"""A bounded local cache of shards that live on S3, shared by all processes of a node.

A shard is cached as a sparse file of its full length, named by its SHA-256, that is filled block by
block as rows are read.  There is no record of the blocks: a row is taken from the file only if its
bytes have the hash in the index, so a hole, a torn write or disk corruption only causes the block to
be fetched again, and processes need not coordinate.  What exceeds the size limit is read by ranges of
single images; in random order, an LRU cache would only thrash.  Files that were unused for some minutes
are evicted first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..storage.base import Store
from ..storage.files import os_fault, read_at
from .index import Shard

log = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
UNUSED_AFTER_S = 600.0  # a shard in use is touched once a minute, so after ten minutes its run has ended
_MARK_EVERY_S = 60.0
_FULL_FOR_S = 10.0  # how long a full cache is not checked again


class ShardCache:
    """Reads ranges of shards from `store` through a cache in `folder` of at most `limit_bytes`."""

    def __init__(self, store: Store, folder: Path, limit_bytes: int):
        self._store, self._folder, self._limit = store, folder, limit_bytes
        self._locks = [threading.Lock() for _ in range(64)]
        self._marked: dict[str, float] = {}
        self._full_until = 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_fault(error, folder) from error

    def read(self, shard: Shard, offset: int, length: int, sha256: bytes) -> bytes:
        """Read `length` bytes at `offset`; the caller must check that their hash is `sha256`.

        Raises:
            MissingObject, EnvironmentFault: from the store.
        """
        cached = self._read_cached(shard, offset, length)
        if hashlib.sha256(cached).digest() == sha256:
            return cached
        first = offset // BLOCK_BYTES * BLOCK_BYTES
        end = min(-(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES, shard.bytes)
        with self._locks[
            hash((shard.file, first)) % len(self._locks)
        ]:  # one thread fetches, the others then hit the cache
            cached = self._read_cached(shard, offset, length)
            if hashlib.sha256(cached).digest() == sha256:
                return cached
            if self._has_room(end - first):
                block = self._store.read_range(shard.file, first, end - first)
                data = block[offset - first : offset - first + length]
                if hashlib.sha256(data).digest() == sha256:
                    self._keep(shard, first, block)
                    return data
        return self._store.read_range(shard.file, offset, length)

    def _path(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}.shard"

    def _read_cached(self, shard: Shard, offset: int, length: int) -> bytes:
        """Read the range from the cache; the result may be empty, incomplete or wrong."""
        try:
            with open(self._path(shard), "rb") as file:
                data = read_at(file.fileno(), offset, length)
        except OSError:  # not cached, evicted meanwhile, or a disk error: read from the store
            return b""
        now = time.monotonic()
        if now - self._marked.get(shard.sha256, -_MARK_EVERY_S) >= _MARK_EVERY_S:
            self._marked[shard.sha256] = now
            with contextlib.suppress(OSError):
                os.utime(self._path(shard))
        return data

    def _keep(self, shard: Shard, first: int, block: bytes) -> None:
        """Write a block to the shard's file unless the cache is full."""
        try:
            with self._only_process(), open(os.open(self._path(shard), os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                if self._make_room(len(block)):
                    os.truncate(file.fileno(), shard.bytes)
                    os.pwrite(file.fileno(), block, first)
        except OSError as error:
            self._full_until = time.monotonic() + _FULL_FOR_S
            log.warning("%s; continuing without caching", os_fault(error, self._folder))

    def _has_room(self, more: int) -> bool:
        if more > self._limit or time.monotonic() < self._full_until:
            return False
        try:
            with self._only_process():
                room = self._make_room(more)
        except OSError as error:
            log.warning("%s; continuing without caching", os_fault(error, self._folder))
            room = False
        if not room:
            self._full_until = time.monotonic() + _FULL_FOR_S
        return room

    def _make_room(self, more: int) -> bool:
        """Evict files that are no longer in use, oldest first, until `more` bytes fit; whether they do."""
        files = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".shard"):
                stat = entry.stat()
                files.append((stat.st_mtime, stat.st_blocks * 512, entry.path))
        used = sum(size for _, size, _ in files)
        for used_at, size, path in sorted(files):
            if used + more <= self._limit or time.time() - used_at < UNUSED_AFTER_S:
                break
            os.unlink(path)
            used -= size
        return used + more <= self._limit

    @contextlib.contextmanager
    def _only_process(self) -> Iterator[None]:
        """Hold the cache's lock, so that one process of the node at a time measures and writes."""
        with open(self._folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
