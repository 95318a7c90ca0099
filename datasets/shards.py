"""Writing shards in sequence, and reading the records of a shard."""

from __future__ import annotations

import hashlib
import logging
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError
from ..storage.base import Store
from ..storage.files import read_at
from ..storage.local import LocalStore
from .index import IMAGES_FILE, INDEX_FILE, LABELS_FILE, PACKING_FILE, Shard, build, image_key
from .journal import Packing, Records, entry_bytes, entry_of, parse, together
from .labels import LABEL, Labels, LabelsEntry
from .records import RECORD
from .sources.archives import MAX_MEMBER_BYTES, tar_members

log = logging.getLogger(__name__)


class ShardWriter:
    """Writes encoded images to shards of bounded size, in order, and stores each shard once it is full.

    A shard is built in `folder`, then stored by a background thread while the next one is filled.
    `position` is the position in the source from which packing continues.  `labels` are those of the source by
    position; those of a finished shard are stored beside it, and become one file at the end.
    """

    def __init__(
        self,
        store: Store,
        packing: Packing,
        records: Records,
        folder: Path,
        name: str,
        image_format: str,
        shard_bytes: int,
        labels: Labels | None = None,
    ):
        self._store, self._finished, self._folder = store, list(packing.finished), folder
        self._name, self._image_format, self._shard_bytes = name, image_format, shard_bytes
        self._records = finished_records(store, packing, records, folder)
        for number, finished in enumerate(packing.finished):
            if finished.shard.file != self._path(number).name:
                raise UserError(
                    f"{store.url} has lost {entry_of(finished.shard)} or a file like it; delete the destination, "
                    "pack again"
                )
        self._row = sum(finished.shard.rows for finished in packing.finished)
        self._number = len(packing.finished)
        self.position = packing.finished[-1].position if packing.finished else 0
        self._remarks = Counter(packing.finished[-1].remarks if packing.finished else {})
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="glann-shard")
        self._upload: Future[None] | None = None
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._filled = 0
        self._labels, self._positions = labels, array("q")  # of the images of the open shard

    def add(self, data: bytes, position: int, remarks: Iterable[str] = ()) -> None:
        """Append one image; `position` is the position in the source after it."""
        if self._file is not None and self._filled + _member_bytes(data) > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            from webdataset import TarWriter  # a second to import; only packing needs it

            self._file = open(self._path(self._number), "wb")  # noqa: SIM115 - closed with the shard
            self._tar = TarWriter(self._file, encoder=False, mtime=0)
            self._filled = 0
        key, _, extension = image_key(self._row, self._image_format).partition(".")
        self._tar.write({"__key__": key, extension: data})
        self._filled += _member_bytes(data)
        self._row += 1
        self._positions.append(position - 1)
        self.pass_over(position, remarks)

    def pass_over(self, position: int, remarks: Iterable[str] = ()) -> None:
        """Count the remarks on an image, which is not added; `position` is the position in the source after it."""
        self.position = position
        self._remarks.update(remarks)

    def store_all(self) -> bytes:
        """Store the unfinished shard too; returns the index records of all images so far."""
        if self._file is not None:
            self._close_shard()
        self._await_upload()
        self._records = [b"".join(self._records)]
        return self._records[0]

    def finish(self, **header: Any) -> tuple[bytes, bytes]:
        """Store the last shard, `labels.bin`, `images.bin`, then `index.json`; return the bytes of the latter two.

        `header`: the other arguments of `index.build`.
        """
        records = self.store_all()
        shards = [finished.shard for finished in self._finished]
        labels = self._store_labels(self._labels) if self._labels else None
        index, images = build(shards=shards, records=records, remarks=self._remarks, labels=labels, **header)
        self._store.write(IMAGES_FILE, images)
        self._store.write(INDEX_FILE, index)
        together(self._store.delete, [_labels_of(shard) for shard in shards] if labels else [])
        together(self._store.delete, [entry_of(finished.shard) for finished in self._finished if finished.records])
        self._store.delete(PACKING_FILE)
        return index, images

    def _store_labels(self, labels: Labels) -> LabelsEntry:
        """Join the labels of the shards, one shard in memory at a time."""
        digest, width = hashlib.sha256(), len(labels.columns) * LABEL.itemsize

        def parts() -> Iterator[memoryview]:
            for finished in self._finished:
                part = self._store.read(_labels_of(finished.shard))
                if len(part) != finished.shard.rows * width:
                    raise UserError(
                        f"{self._store.url}/{_labels_of(finished.shard)} is damaged; delete the destination, pack again"
                    )
                digest.update(part)
                yield memoryview(part)

        self._store.write(LABELS_FILE, parts())
        return LabelsEntry(columns=labels.columns, sha256=digest.hexdigest(), source=labels.identity)

    def close(self) -> None:
        """Wait for the running upload and drop the unfinished shard; stored shards remain."""
        self._uploader.shutdown(wait=True)
        self._close_files()

    def _close_files(self) -> None:
        if self._file is not None:
            self._tar.close()
            self._file.close()
        self._file = self._tar = None

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._name}-{number:06d}.tar"

    def _close_shard(self) -> None:
        self._close_files()
        self._await_upload()
        path, remarks = self._path(self._number), dict(self._remarks)
        labels = self._labels.value_NL[np.array(self._positions, np.int64)].astype(LABEL) if self._labels else None
        self._positions = array("q")
        self._upload = self._uploader.submit(self._store_shard, path, self.position, remarks, labels)
        self._number += 1

    def _await_upload(self) -> None:
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def _store_shard(self, path: Path, position: int, remarks: dict[str, int], labels: np.ndarray | None) -> None:
        shard, records = scan(path, path.name)
        if labels is not None:
            self._store.write(_labels_of(shard), labels.tobytes())
        self._store.write(path.name, path)
        path.unlink()
        self._records.append(records)
        entry = entry_bytes(shard, position, remarks, records)
        self._store.write(entry_of(shard), entry)
        self._finished.append(parse(entry)[0])

    @property
    def rows(self) -> int:
        """The number of images so far, with those of earlier runs."""
        return self._row

    @property
    def remarks(self) -> Counter[str]:
        """The number of images by remark, with those of earlier runs."""
        return self._remarks


def _labels_of(shard: Shard) -> str:
    """The file of a shard's labels while the data set is packed."""
    return f"{shard.file.removesuffix('.tar')}.labels"


def _member_bytes(data: bytes) -> int:
    """The size of an image in a tar file: a header block and whole blocks of data."""
    return tarfile.BLOCKSIZE * (1 - -len(data) // tarfile.BLOCKSIZE)


def finished_records(store: Store, packing: Packing, records: Records, folder: Path) -> list[bytes]:
    """The index records of the finished shards, which are verified.

    On a local disk the shards are read again. In an object store, which takes objects whole and checks them, their
    sizes are compared, and only those of an earlier version, whose records were not kept, are read.

    Raises:
        UserError: a shard is damaged, or is missing.
    """
    found: list[bytes] = []
    sizes = {} if isinstance(store, LocalStore) else store.sizes()
    for finished in packing.finished:
        file_name = finished.shard.file
        if isinstance(store, LocalStore):
            shard, record = scan(store.path(file_name), file_name)
        elif finished.records:
            record = records[file_name]
            shard = finished.shard.model_copy(update={"bytes": sizes.get(file_name, 0)})
        else:
            store.download(file_name, folder / file_name)
            shard, record = scan(folder / file_name, file_name)
            (folder / file_name).unlink()
        if (shard, record) != (finished.shard, records.get(file_name, record)):
            raise UserError(
                f"{store.url}/{file_name} is damaged or of another pack; delete the destination, pack again"
            )
        log.info("%s of an earlier run is complete", file_name)
        found.append(record)
    return found


def scan(path: Path, file_name: str) -> tuple[Shard, bytes]:
    """Read a shard's index entry and the records of its images from the tar file. Raises UserError."""
    digest = hashlib.sha256()
    records = []
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        size = file.tell()
        file.seek(0)
        for member in tar_members(file, str(path)):
            whole = member.isreg() and member.sparse is None and member.offset_data + member.size <= size
            if not whole or member.size > MAX_MEMBER_BYTES:
                raise UserError(f"{path} is not a shard: its member {member.name[:100]!r} is not a plain image file")
            image = read_at(file.fileno(), member.offset_data, member.size)
            image_hash = hashlib.sha256(image).digest()
            records.append((member.offset_data, member.size, np.frombuffer(image_hash, np.uint8)))
    if not records or size < 2 * tarfile.BLOCKSIZE:
        raise UserError(f"{path} holds no images")
    shard = Shard(file=file_name, rows=len(records), bytes=size, sha256=digest.hexdigest())
    return shard, np.array(records, RECORD).tobytes()
