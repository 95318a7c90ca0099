"""Random access to the images of a packed data set, in a folder or on S3 with a bounded local cache.

Every image is checked against the SHA-256 in the index before it is decoded.
Legend: N rows, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np

from ..config.paths import expand
from ..config.sections import S3Config
from ..errors import EnvironmentFault, UserError
from ..storage.base import MissingObject, Store, TruncatedObject
from ..storage.local import LocalStore
from ..storage.open import open_store
from .cache import ShardCache
from .codec import BadImage, decode_packed
from .index import Index, Shard
from .labels import Labels


class CorruptImage(EnvironmentFault):
    """An image that differs from what was packed; the message names the shard and the key."""

    def __init__(self, row: int, place: str, reason: str):
        super().__init__(f"corrupt image: row {row}, {place}: {reason}")
        self.row = row


def read_labels(url: str, s3: S3Config | None = None) -> Labels | None:
    """The labels of the packed data set at `url`, for judges; None if it has none. Raises UserError."""
    return Index.load(url, s3).read_labels(open_store(url, s3))


class ImageRows:
    """Random access to the images of a packed data set by global row id. Safe for use by many threads.

    Args:
        url: folder or s3:// prefix of the data set.
        cache_dir: cache folder of shards from S3; empty means ~/.cache/glann/shards.
        cache_gb: size limit of that folder in gigabytes, for all processes of the node.
        max_rows: use the first rows only.
        memory_mb: a data set whose pixels fit into this much memory is decoded once per process; 0 turns that off.
    """

    def __init__(
        self,
        url: str,
        s3: S3Config | None = None,
        *,
        cache_dir: str | None = None,
        cache_gb: float = 20.0,
        max_rows: int | None = None,
        memory_mb: float = 256.0,
    ):
        self.index = Index.load(url, s3)
        self._rows = min(self.index.rows, max_rows or self.index.rows)
        self._store = open_store(url, s3)
        self._cache: ShardCache | None = None
        if not isinstance(self._store, LocalStore):
            self._cache = ShardCache(self._store, _cache_folder(cache_dir), int(cache_gb * 1e9))

        shape = (self._rows, self.index.channels, self.index.resolution, self.index.resolution)
        # Decoding a tiny PNG is mostly Python, which holds the GIL. Memory pages are allocated as rows are read.
        fits = math.prod(shape) <= memory_mb * 1e6
        self._pixels_NCHW = np.zeros(shape if fits else (0, 0, 0, 0), np.uint8)
        self._decoded_N = np.zeros(self._rows if fits else 0, bool)

    def __len__(self) -> int:
        return self._rows

    def labels(self) -> np.ndarray | None:
        """The first label of every row, int32 [N], -1 where it is not known; None if the data have none."""
        found = self.index.read_labels(self._store)
        return None if found is None else found.value_NL[: self._rows, 0]

    @property
    def shared_store(self) -> Store | None:
        """The store of the data; None if they are in a folder."""
        return None if isinstance(self._store, LocalStore) else self._store

    @property
    def waits(self) -> bool:
        """Whether a read waits for a request to storage, rather than for a disk."""
        return self._cache is not None

    def is_decoded(self, row: int) -> bool:
        """Whether the pixels of `row` are in memory."""
        return 0 <= row < len(self._decoded_N) and bool(self._decoded_N[row])

    def read(self, row: int) -> bytes:
        """Read the encoded image of `row`, verified against the index.

        Raises:
            CorruptImage: its bytes differ from those that were packed.
        """
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        shard = self.index.shards[self.index.shard_of(row)]
        record = self.index.records[row]
        sha256 = record["sha256"].tobytes()
        try:
            data = self._read_range(shard, int(record["offset"]), int(record["length"]), sha256)
        except TruncatedObject as error:
            raise self._corrupt(row, f"the shard is truncated ({error})") from error
        except MissingObject as error:
            raise UserError(f"{self._store.url} lacks {shard.file}; copy or pack the data set again") from error
        if hashlib.sha256(data).digest() != sha256:
            raise self._corrupt(row, "its bytes do not have the SHA-256 of the index")
        return data

    def _read_range(self, shard: Shard, offset: int, length: int, sha256: bytes) -> bytes:
        if self._cache is None:
            return self._store.read_range(shard.file, offset, length)
        return self._cache.read(shard, offset, length, sha256)

    def _corrupt(self, row: int, reason: str) -> CorruptImage:
        shard = self.index.shards[self.index.shard_of(row)]
        return CorruptImage(row, f"{self._store.url}/{shard.file}: {self.index.key(row)}", reason)

    def decode(self, row: int, data: bytes | None = None) -> np.ndarray:
        """Decode the image of `row` to uint8 [C, H, W]; must not be modified.

        Args:
            data: what `read` returned for it, if it was called before.
        Raises:
            CorruptImage: it differs from what was packed.
        """
        if self.is_decoded(row):
            return self._pixels_NCHW[row]
        data = self.read(row) if data is None else data
        try:
            img_CHW = decode_packed(data, self.index.resolution, self.index.channels, self.index.image_format)
        except BadImage as error:
            raise self._corrupt(row, str(error)) from error
        if 0 <= row < len(self._decoded_N):
            self._pixels_NCHW[row] = img_CHW
            self._decoded_N[row] = True  # last: other threads may read at any moment
        return img_CHW


def _cache_folder(cache_dir: str | None) -> Path:
    if cache_dir:
        return expand(cache_dir)
    from .assets.catalogue import cache_dir as default  # imported only if needed

    return default() / "shards"
