"""Where images come from: folders, archives, idx and npz files, parquet, named assets, packed data sets.

A source is a fixed, ordered list of images.  It never writes: archives are read member by member
and nothing is extracted.  Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..config import S3Config
from ..errors import UserError
from .codec import BadImage
from .storage import Store, check_key, open_store, split_url

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".gif")
MAX_ARRAY_BYTES = 16 << 30  # of an npz or idx file
CELEBA_MASK_FOLDER = "CelebA-HQ-img/"  # the photographs in a CelebAMask-HQ folder; its other files are masks


@dataclass(frozen=True)
class Item:
    """One image of a source: a name for messages and a function that reads its bytes or its pixels.

    `read` may be called from any thread; pixels are uint8 [H, W] or [H, W, C].
    """

    name: str
    read: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """An ordered list of `count` images. `identity` is a hash of what the source holds, not of where it lies."""

    name: str
    count: int
    identity: str
    items: Callable[[int], Iterator[Item]]  # the images from this position on


def open_source(source: str, s3: S3Config | None = None) -> Source:
    """The images at `source`: a named asset, or a local path or s3:// url of a folder or file.

    Folders and archives are taken in the natural order of their names (2.jpg before 10.jpg).
    Raises:
        UserError: when there is nothing, or nothing that is known.
    """
    from . import assets  # only named sources need the registry

    if source in assets.ASSETS:
        if assets.ASSETS[source].kind != "images":
            raise UserError(f"{source} is a set of weights, not of images")
        found = open_source(str(assets.fetch(source)), s3)
        return Source(source, found.count, found.identity, found.items)
    suffix = _suffix(source)
    if suffix or _is_file(source):
        parent, file_name = split_url(source)
        store = open_store(parent, s3)
        if not store.exists(file_name):
            _refuse_missing(source)
        return _open_file(store, file_name, suffix)
    return _open_folder(source, s3)


def _is_file(source: str) -> bool:
    return "://" not in source and Path(source).expanduser().is_file()


def _suffix(source: str) -> str:
    """The kind of file a name points at, or "" for a folder."""
    if "://" not in source and Path(source).expanduser().is_dir():
        return ""
    name = source.rstrip("/").rsplit("/", 1)[-1].lower()
    for suffix in (".zip", ".npz", ".tar", ".parquet"):
        if name.endswith(suffix):
            return suffix
    return ".idx" if re.search(r"[.-]ubyte(\.gz)?$", name) else ""


def _refuse_missing(source: str) -> None:
    import difflib

    from . import assets

    names = [name for name, asset in assets.ASSETS.items() if asset.kind == "images"]
    close = difflib.get_close_matches(source, names, 1)
    hint = f"did you mean {close[0]}?" if close else "named data sets: " + ", ".join(sorted(names))
    raise UserError(f"there are no images at {source} ({hint})")


def _open_file(store: Store, file_name: str, suffix: str) -> Source:
    from .archives import open_tar, open_zip
    from .parquet import open_parquet

    if suffix == ".zip":
        return open_zip(store, file_name)
    if suffix == ".tar":
        return open_tar(store, file_name)
    if suffix == ".parquet":
        return open_parquet(store, {file_name: store.size(file_name)}, file_name)
    if suffix == ".npz":
        return _array_source(file_name, _read_npz(store, file_name))
    if suffix == ".idx":
        return _array_source(file_name, _read_idx(store, file_name))
    raise UserError(f"{store.url}/{file_name} is no folder, zip, tar, npz, idx (…-ubyte) or parquet file")


def _open_folder(source: str, s3: S3Config | None) -> Source:
    from .index import INDEX_FILE, Index
    from .parquet import open_parquet

    store = open_store(source, s3)
    sizes = store.sizes()
    if not sizes:
        _refuse_missing(source)
    if INDEX_FILE in sizes:
        return _packed_source(store, Index.load(source, s3))
    name = source.rstrip("/").rsplit("/", 1)[-1]
    if parquet := {key: size for key, size in sizes.items() if key.endswith(".parquet")}:
        return open_parquet(store, parquet, name)
    masks = any(key.startswith(CELEBA_MASK_FOLDER) for key in sizes)
    images = [key for key in sizes if is_image(key) and (not masks or key.startswith(CELEBA_MASK_FOLDER))]
    if not images:
        raise UserError(f"{source} holds {len(sizes)} files but no image ({', '.join(IMAGE_SUFFIXES)})")
    images.sort(key=natural)

    def items(start: int) -> Iterator[Item]:
        for key in images[start:]:
            yield Item(f"{source.rstrip('/')}/{key}", partial(store.read, key))

    return Source(name, len(images), identity("folder", [(key, sizes[key]) for key in images]), items)


def _packed_source(store: Store, index) -> Source:
    """The images of a packed data set, to pack them again in another size."""

    def items(start: int) -> Iterator[Item]:
        for row in range(start, index.rows):
            shard = index.shards[index.shard_of(row)]
            record = index.records_N[row]

            def read(shard=shard, record=record) -> bytes:
                data = store.read_range(shard.file, int(record["offset"]), int(record["length"]))
                if hashlib.sha256(data).digest() != record["sha256"].tobytes():
                    raise BadImage("wrong SHA-256")
                return data

            yield Item(f"{store.url}/{shard.file}: {index.key(row)}", read)

    return Source(index.name, index.rows, identity("packed", [index.fingerprint]), items)


def _array_source(name: str, images: np.ndarray) -> Source:
    def items(start: int) -> Iterator[Item]:
        for row in range(start, len(images)):
            yield Item(f"{name}[{row}]", partial(images.__getitem__, row))

    shape = [str(images.dtype), list(images.shape)]
    content = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    return Source(name.split(".")[0], len(images), identity("array", [shape, content]), items)


def _read_npz(store: Store, key: str) -> np.ndarray:
    """The uint8 images [N, H, W] or [N, H, W, C] of an npz file: its `images`, or its only array of that kind."""
    where = f"{store.url}/{key}"
    data = store.read(key)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            _refuse_bomb(where, sum(member.file_size for member in members.infolist()))
            for member in members.infolist():
                _refuse_liar(where, members, member)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            names = ["images"] if "images" in arrays.files else arrays.files
            found = [array for array in map(arrays.__getitem__, names) if array.ndim in (3, 4)]
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        raise UserError(f"{where} is not a readable npz file of plain arrays ({_first_line(error)})") from error
    if len(found) != 1:
        raise UserError(f"{where} must hold one array of images, named `images`, of shape [N, H, W] or [N, H, W, C]")
    images = found[0]
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or not images.size or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(f"{where}: images are {images.dtype} {list(images.shape)}, not uint8 [N, H, W(, 1 or 3)]")
    return images


def _refuse_liar(where: str, members: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse an array that says it is larger than its file: numpy would take the memory first."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with members.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:
            raise UserError(f"{where} is not a readable npz file of plain arrays (its format is {version})")
        shape, _, kind = headers[version](file)
    if math.prod(shape) * kind.itemsize > member.file_size or min(shape, default=0) < 0:
        raise UserError(f"{where} is not a readable npz file of plain arrays (an array of {list(shape)} is not in it)")


def _read_idx(store: Store, key: str) -> np.ndarray:
    """The uint8 images [N, H, W] of an idx3-ubyte file (LeCun's MNIST format), plain or gzipped."""
    where = f"{store.url}/{key}"
    data = store.read(key)
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = _up_to(file, 16)
                data += _up_to(file, _idx_bytes(where, data) + 1)  # one more than it should be: a bomb goes no further
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{where} is not a complete gzip file ({_first_line(error)})") from error
    if len(data) != 16 + (expected := _idx_bytes(where, data)):
        raise UserError(f"{where} is truncated or too long: it should have {16 + expected} bytes")
    count, height, width = _idx_shape(data)
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, height, width)


def _idx_bytes(where: str, data: bytes) -> int:
    """How many pixels an idx file of images holds, as its header says."""
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
    """The next `length` bytes, or what there is; memory is taken as they come."""
    chunks = []
    while length > 0 and (chunk := file.read(min(length, 1 << 20))):
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)


def _refuse_bomb(where: str, size: int) -> None:
    if size > MAX_ARRAY_BYTES:
        raise UserError(
            f"{where} unpacks to {size >> 20} MiB, which are held in memory at once; make a folder or a zip of images"
        )


def is_image(key: str) -> bool:
    """Whether the name is that of an image; hidden files and macOS's shadow files are not."""
    name = key.rsplit("/", 1)[-1]
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and not key.startswith("__MACOSX/")


def safe_members(where: str, names: list[str]) -> None:
    """Refuse an archive with a name that would leave the folder it is unpacked in, or with one name twice."""
    seen: set[str] = set()
    for name in names:
        try:
            check_key(name.removeprefix("./"))
        except UserError as error:
            raise UserError(f"{where} holds the hostile member name {name!r}; it is refused") from error
        if name in seen:
            raise UserError(f"{where} holds {name!r} twice; it is refused")
        seen.add(name)


def natural(key: str) -> tuple:
    """Sort key with numbers in names by value; ties by the name itself."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", key)], key


def identity(kind: str, contents: list) -> str:
    """A hash of what a source holds, to recognise it when packing goes on."""
    return hashlib.sha256(json.dumps([kind, contents], separators=(",", ":")).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
