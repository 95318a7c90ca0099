"""Images as arrays: npz and idx files.

Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial

import numpy as np

from ...errors import UserError, first_line
from ...storage.base import Store
from ..labels import UNKNOWN, of_column
from .base import Item, Source, identity

MAX_ARRAY_BYTES = 16 << 30  # of an npz or idx file
_LABELS = ("labels", "test_labels")
_OWN = ("images", "test_images", *_LABELS)  # arrays of an npz file with a meaning


def array_source(name: str, images: np.ndarray) -> Source:
    def items(start: int) -> Iterator[Item]:
        for row in range(start, len(images)):
            yield Item(f"{name}[{row}]", partial(images.__getitem__, row))

    shape = [str(images.dtype), list(images.shape)]
    content = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    return Source(name.split(".")[0], len(images), identity("array", [shape, content]), items)


def npz_source(store: Store, key: str) -> Source:
    """The images of an npz file, `images` or the only array of such shape, uint8 [N, H, W] or [N, H, W, C].

    Beside `images`, `labels` [N] are their labels, and `test_images` with `test_labels` are held out.
    """
    where = f"{store.url}/{key}"
    arrays = _read_npz(where, store.read(key))
    candidates = [arrays["images"]] if "images" in arrays else list(arrays.values())
    found = [array for array in candidates if array.ndim in (3, 4)]
    if len(found) != 1:
        raise UserError(f"{where} must hold one array of images, named `images`, of shape [N, H, W] or [N, H, W, C]")
    source = _labelled(array_source(key, _images(where, found[0])), arrays.get("labels"))
    if "images" not in arrays or "test_images" not in arrays:
        return source
    test = array_source(f"{key}: test_images", _images(f"{where}: test_images", arrays["test_images"]))
    return dataclasses.replace(source, held_out=_labelled(test, arrays.get("test_labels")))


def _labelled(source: Source, value_N: np.ndarray | None) -> Source:
    """The source with labels, if they are one integer for each image."""
    if value_N is None or value_N.shape != (source.count,) or value_N.dtype.kind not in "iu":
        return source
    if value_N.min() < UNKNOWN or value_N.max() >= 1 << 31:
        return source
    return dataclasses.replace(source, labels=of_column("class", value_N))


def _read_npz(where: str, data: bytes) -> dict[str, np.ndarray]:
    """The arrays with a meaning beside `images`, or all if there is no array of that name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            _refuse_bomb(where, sum(member.file_size for member in members.infolist()))
            for member in members.infolist():
                _refuse_liar(where, members, member)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            read = {}
            for name in _OWN if "images" in arrays.files else arrays.files:
                if name in arrays.files:
                    with contextlib.suppress(ValueError) if name in _LABELS else contextlib.nullcontext():
                        read[name] = arrays[name]  # labels may be objects, which are not unpickled
            return read
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        raise UserError(f"{where} is not a readable npz file of plain arrays ({first_line(error)})") from error


def _images(where: str, images: np.ndarray) -> np.ndarray:
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or not images.size or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(f"{where}: images are {images.dtype} {list(images.shape)}, not uint8 [N, H, W(, 1 or 3)]")
    return images


def _refuse_liar(where: str, members: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Reject an array whose header claims more data than the file has: numpy would allocate the memory first."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with members.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:
            raise UserError(f"{where} is not a readable npz file of plain arrays (its format is {version})")
        shape, _, kind = headers[version](file)
    if math.prod(shape) * kind.itemsize > member.file_size or min(shape, default=0) < 0:
        raise UserError(f"{where} is not a readable npz file of plain arrays (an array of {list(shape)} is not in it)")


def read_idx(store: Store, key: str) -> np.ndarray:
    """The uint8 images [N, H, W] of an idx3-ubyte file (LeCun's MNIST format), plain or gzipped."""
    where = f"{store.url}/{key}"
    data = store.read(key)
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = _up_to(file, 16)
                data += _up_to(
                    file, _idx_bytes(where, data) + 1
                )  # one byte more than expected, which bounds a decompression bomb
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{where} is not a complete gzip file ({first_line(error)})") from error
    if len(data) != 16 + (expected := _idx_bytes(where, data)):
        raise UserError(f"{where} is truncated or too long: it should have {16 + expected} bytes")
    count, height, width = _idx_shape(data)
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, height, width)


def _idx_bytes(where: str, data: bytes) -> int:
    """The number of pixels in the header of an idx file of images. Raises UserError if it is invalid."""
    magic = int.from_bytes(data[:4], "big")
    if magic != 0x803:
        kind = "labels, not images" if magic == 0x801 else "no idx file of byte images"
        raise UserError(f"{where} is {kind} (magic number {magic:#x}, images have 0x803)")
    expected = math.prod(_idx_shape(data))
    if len(data) < 16 or not expected:
        raise UserError(f"{where} is truncated: it holds no images")
    _refuse_bomb(where, expected)
    return expected


def _idx_shape(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "big") for at in (4, 8, 12)]


def _up_to(file: gzip.GzipFile, length: int) -> bytes:
    """Read up to `length` bytes in chunks, so that memory is allocated as they arrive."""
    chunks = []
    while length > 0 and (chunk := file.read(min(length, 1 << 20))):
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)


def _refuse_bomb(where: str, size: int) -> None:
    if size > MAX_ARRAY_BYTES:
        raise UserError(
            f"{where} unpacks to {size >> 20} MiB, which must fit in memory; make a folder or a zip of images"
        )
