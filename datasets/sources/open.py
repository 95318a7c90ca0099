"""Open the source at an address: a named asset, a folder, an archive or a file of arrays."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial

from ...config.paths import expand
from ...config.sections import S3Config
from ...errors import UserError
from ...storage.base import Store, split_url
from ...storage.open import open_store
from ..codec import BadImage
from .arrays import array_source, read_idx, read_npz
from .base import IMAGE_SUFFIXES, Item, Source, identity, is_image, natural

CELEBA_MASK_FOLDER = "CelebA-HQ-img/"  # the photographs of a CelebAMask-HQ folder; its other files are masks


def open_source(source: str, s3: S3Config | None = None) -> Source:
    """Open the images at `source`: a named asset, or a local path or s3:// URL of a folder or file.

    Images of folders and archives are in the natural order of their names (2.jpg before 10.jpg).
    Raises:
        UserError: no images there, or an unknown format.
    """
    from ..assets import catalogue as assets  # only named sources need the catalogue

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
    return "://" not in source and expand(source).is_file()


def _suffix(source: str) -> str:
    """The suffix of a file by its name, or "" for a folder."""
    if "://" not in source and expand(source).is_dir():
        return ""
    name = source.rstrip("/").rsplit("/", 1)[-1].lower()
    for suffix in (".zip", ".npz", ".tar", ".parquet"):
        if name.endswith(suffix):
            return suffix
    return ".idx" if re.search(r"[.-]ubyte(\.gz)?$", name) else ""


def _refuse_missing(source: str) -> None:
    import difflib

    from ..assets import catalogue as assets

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
        return array_source(file_name, read_npz(store, file_name))
    if suffix == ".idx":
        return array_source(file_name, read_idx(store, file_name))
    raise UserError(f"{store.url}/{file_name} is no folder, zip, tar, npz, idx (…-ubyte) or parquet file")


def _open_folder(source: str, s3: S3Config | None) -> Source:
    from ..index import INDEX_FILE, Index
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
    """The images of a packed data set, to pack them again at another size."""

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
