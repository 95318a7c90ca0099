"""Objects of a store as seekable, read-only files, for libraries that need them."""

from __future__ import annotations

import io
from typing import IO

from .base import Store
from .local import LocalStore


def open_file(store: Store, key: str, buffer_bytes: int = 1 << 20) -> IO[bytes]:
    """Open an object for reading; on S3 every buffer is one range read."""
    if isinstance(store, LocalStore):
        store.size(key)  # raises the store's own error for a missing or unreadable file
        return open(store.path(key), "rb")
    return io.BufferedReader(_Ranges(store, key), buffer_bytes)


class _Ranges(io.RawIOBase):
    def __init__(self, store: Store, key: str):
        self._store, self._key, self._size, self._at = store, key, store.size(key), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        length = min(len(buffer), max(0, self._size - self._at))
        if length:
            buffer[:length] = self._store.read_range(self._key, self._at, length)
        self._at += length
        return length
