"""A folder or an S3 prefix as a source: what is in it decides what it is, never a name alone.

It is a packed data set, a folder of pictures, of parquet files, or of zip and tar files (shards). Everything is
listed once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial

from ...config.sections import S3Config
from ...errors import UserError
from ...storage.base import Store
from ...storage.local import LINK, LocalStore
from ...storage.open import open_store
from ..codec import BadImage
from ..index import HELD_OUT, IMAGES_FILE, INDEX_FILE, LABELS_FILE, PACKING_FILE, Index, held_out_url
from ..left_out import BESIDE, Tally, counted
from .archives import open_archives
from .base import Item, Source, identity, natural
from .names import NoImages, Rules, Selection, extension
from .parquet import inspected, parquet_source

_ARCHIVES = (".tar", ".zip")
_CONTAINERS = (*_ARCHIVES, ".parquet")
_OURS = re.compile(rb'"format"\s*:\s*"glann-images"')
_OUR_FILES = (INDEX_FILE, IMAGES_FILE, LABELS_FILE, PACKING_FILE)
_HEAD = 4096  # bytes of an index.json in which the format is stated


class _Listing:
    """One pass over the files of a folder."""

    def __init__(self, store: Store, rules: Rules) -> None:
        self.files = 0
        self.images: list[tuple[str, int, str]] = []  # key, size, why it cannot be read
        self.containers: dict[str, int] = {}  # key -> size, of archives and parquet files
        self.broken: dict[str, str] = {}  # key of a container -> why it cannot be read
        self.selection = Selection(rules)
        self.ours: dict[str, int] = {}  # key -> size, of files named as those of packed data sets
        for key, size, fault in store.entries():
            self.files += 1
            lower = key.lower()
            if key.rsplit("/", 1)[-1] in _OUR_FILES and not fault:
                self.ours[key] = size
            if lower.endswith(_CONTAINERS) and rules.reason(key) == (extension(lower.rsplit("/", 1)[-1]), ""):
                self.containers[key] = size
                if fault:
                    self.broken[key] = fault
            elif self.selection.takes(key, "" if fault.startswith(LINK) else fault):
                self.images.append((key, size, fault))

    def of(self, *suffixes: str) -> dict[str, int]:
        return {key: size for key, size in self.containers.items() if key.lower().endswith(suffixes)}


def open_folder(store: Store, name: str, rules: Rules, s3: S3Config | None = None) -> Source | None:
    """The images of a folder; None if there is no file in it.

    Raises:
        UserError: no images, an unfinished pack, or images of several kinds.
    """
    listing = _Listing(store, rules)
    if not listing.files:
        return None
    if _is_packed(store, listing):
        return _packed_source(store, listing, s3)
    if _is_unfinished(store, listing):
        raise UserError(f"{store.url} is an unfinished pack; finish it with the command that began it, then use it")
    parquet = listing.of(".parquet")
    readable = {key: size for key, size in parquet.items() if key not in listing.broken}
    found = inspected(store, readable) if readable else None
    archives = listing.of(*_ARCHIVES)
    kinds = {
        counted(len(listing.images), "image"): bool(listing.images),
        counted(len(found.columns) if found else 0, "parquet file") + " of images": bool(found and found.columns),
        counted(len(archives), "archive") + " (zip, tar)": bool(archives) and not listing.images,
    }
    if sum(kinds.values()) > 1:
        given = " and ".join(kind for kind, present in kinds.items() if present)
        raise UserError(
            f"{store.url} holds {given}; name one of them, or leave one out with --exclude, say '*.parquet'"
        )
    tally = Tally()
    if listing.images:
        tally.add_all(listing.selection.left_out())
        _count(tally, listing.containers)
        return _images_source(store, name, listing, tally)
    _refuse_broken(store, listing)
    tally.add_all(listing.selection.left_out())
    if found and found.columns:
        _count(tally, [*archives, *found.without])
        return parquet_source(store, name, {key: parquet[key] for key in found.columns}, found, tally.groups())
    if archives:
        _refuse_data_sets(store, listing, archives)
        inner = open_archives(store, list(archives), name, rules)
        tally.add_all(inner.left_out)
        _count(tally, parquet)
        return dataclasses.replace(inner, left_out=tally.groups())
    if found and found.without:
        raise next(iter(found.without.values()))
    raise NoImages(store.url, tally.groups())


def _is_packed(store: Store, listing: _Listing) -> bool:
    """Whether the folder's index.json is that of a packed data set: by its content, or by the file beside it."""
    size = listing.ours.get(INDEX_FILE)
    if size is None:
        return False
    return IMAGES_FILE in listing.ours or bool(_OURS.search(store.read_range(INDEX_FILE, 0, min(size, _HEAD))))


def _is_unfinished(store: Store, listing: _Listing) -> bool:
    size = listing.ours.get(PACKING_FILE)
    if size is None or not any(key.endswith(".tar") and "/" not in key for key in listing.containers):
        return False
    try:
        return isinstance(json.loads(store.read(PACKING_FILE)), dict)
    except (ValueError, RecursionError):
        return False


def _images_source(store: Store, name: str, listing: _Listing, tally: Tally) -> Source:
    images = sorted(listing.images, key=lambda image: natural(image[0]))
    url = store.url.rstrip("/")

    def items(start: int) -> Iterator[Item]:
        for key, _, fault in images[start:]:
            yield Item(f"{url}/{key}", partial(_refuse, fault) if fault else partial(store.read, key))

    hashed = identity("folder", [(key, size) for key, size, _ in images])

    def beside(path: str) -> bytes | None:
        inside = not {"", ".", ".."} & set(path.split("/"))  # others lead elsewhere, or are addresses
        return store.read(path) if inside and store.exists(path) else None

    return Source(
        name,
        len(images),
        hashed,
        items,
        tally.groups(),
        listing.selection.doubts(),
        names=lambda: [key for key, _, _ in images],
        beside=beside,
    )


def _refuse(fault: str) -> bytes:
    raise BadImage(fault)


def _count(tally: Tally, keys) -> None:
    for key in keys:
        tally.add(extension(key.rsplit("/", 1)[-1]))


def _refuse_broken(store: Store, listing: _Listing) -> None:
    for key, fault in sorted(listing.broken.items()):
        raise UserError(f"{store.url}/{key} is {fault}; mend it, or leave it out with --exclude {key!r}")


def _refuse_data_sets(store: Store, listing: _Listing, archives: dict[str, int]) -> None:
    """Shards of packed data sets are not read without their indices."""
    folders = {key.rpartition("/")[0] for key in archives}
    packed = sorted(f for f in folders if f"{f}/{INDEX_FILE}" in listing.ours and f"{f}/{IMAGES_FILE}" in listing.ours)
    if packed:
        raise UserError(f"{store.url} holds packed data sets ({', '.join(packed[:3])}); name one of them")


def _packed_source(store: Store, listing: _Listing, s3: S3Config | None) -> Source:
    """The images of a packed data set, to pack them again at another size, with its labels and its held-out part."""
    index, tally = Index.load_from(store), Tally()
    files, held_out = _files(index), None
    if index.held_out:
        url = held_out_url(store.url)
        beside = LocalStore(store.root / HELD_OUT) if isinstance(store, LocalStore) else open_store(url, s3)
        part = index.load_held_out(beside)
        held_out = _packed_part(beside, part)
        files += [f"{HELD_OUT}/{file}" for file in _files(part)]
    if others := listing.files - sum(file in listing.containers or file in listing.ours for file in files):
        tally.add(BESIDE, count=others)
    return dataclasses.replace(_packed_part(store, index), left_out=tally.groups(), held_out=held_out)


def _files(index: Index) -> list[str]:
    """The files of a packed data set."""
    return [INDEX_FILE, IMAGES_FILE, *([LABELS_FILE] if index.labels else []), *(shard.file for shard in index.shards)]


def _packed_part(store: Store, index: Index) -> Source:
    def items(start: int) -> Iterator[Item]:
        for row in range(start, index.rows):
            shard = index.shards[index.shard_of(row)]
            record = index.records[row]

            def read(shard=shard, record=record) -> bytes:
                data = store.read_range(shard.file, int(record["offset"]), int(record["length"]))
                if hashlib.sha256(data).digest() != record["sha256"].tobytes():
                    raise BadImage("wrong SHA-256")
                return data

            yield Item(f"{store.url}/{shard.file}: {index.key(row)}", read)

    hashed = identity("packed", [index.fingerprint])
    return Source(index.name, index.rows, hashed, items, labels=index.read_labels(store), asset=index.asset)
