"""A bounded local cache of shards that live on S3, shared by all processes of a node.

A shard is cached as a sparse file of its full length, named by its SHA-256, that fills block by
block as rows are asked for.  Nothing records which blocks are there: a row is taken from the file
only if its bytes have the hash in the index, so a hole, a torn write or a damaged disk is just a
block to fetch again, and processes need no agreement on the contents.  What does not fit into the
bound is read by ranges of single images instead; a random order would only churn an LRU cache.
Files that nobody has used for some minutes make room first.
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
UNUSED_AFTER_S = 600.0  # a shard in use is marked once a minute, so ten minutes mean that its run is gone
_MARK_EVERY_S = 60.0
_FULL_FOR_S = 10.0  # how long a full cache is not measured again


class ShardCache:
    """Reads ranges of shards from `store` through the folder `folder` of at most `limit_bytes`."""

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
        """The bytes at `offset`; whether their hash is `sha256` is for the caller to check.

        Raises:
            MissingObject, EnvironmentFault: as the store does.
        """
        cached = self._read_cached(shard, offset, length)
        if hashlib.sha256(cached).digest() == sha256:
            return cached
        first = offset // BLOCK_BYTES * BLOCK_BYTES
        end = min(-(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES, shard.bytes)
        with self._locks[hash((shard.file, first)) % len(self._locks)]:  # one thread fetches, the others find it
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
        """What the cache has there: anything from nothing to the right bytes."""
        try:
            with open(self._path(shard), "rb") as file:
                data = read_at(file.fileno(), offset, length)
        except OSError:  # not cached, or just evicted, or a bad disk: in every case the store has it
            return b""
        now = time.monotonic()
        if now - self._marked.get(shard.sha256, -_MARK_EVERY_S) >= _MARK_EVERY_S:
            self._marked[shard.sha256] = now
            with contextlib.suppress(OSError):
                os.utime(self._path(shard))
        return data

    def _keep(self, shard: Shard, first: int, block: bytes) -> None:
        """Put a block into the shard's file unless the cache is full."""
        try:
            with self._only_process(), open(os.open(self._path(shard), os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                if self._make_room(len(block)):
                    os.truncate(file.fileno(), shard.bytes)
                    os.pwrite(file.fileno(), block, first)
        except OSError as error:
            self._full_until = time.monotonic() + _FULL_FOR_S
            log.warning("%s; going on without caching", os_fault(error, self._folder))

    def _has_room(self, more: int) -> bool:
        if more > self._limit or time.monotonic() < self._full_until:
            return False
        try:
            with self._only_process():
                room = self._make_room(more)
        except OSError as error:
            log.warning("%s; going on without caching", os_fault(error, self._folder))
            room = False
        if not room:
            self._full_until = time.monotonic() + _FULL_FOR_S
        return room

    def _make_room(self, more: int) -> bool:
        """Whether `more` bytes fit, after the removal of files that are no longer in use, oldest first."""
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
        """Measure and write without another process of the node doing so at the same time."""
        with open(self._folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
