"""The index of a packed data set: place and hash of every image.

`index.json` is small: the shape of the images and one entry per shard.  The records of the images are
in `images.bin` beside it, 44 bytes per row (offset u64, length u32, SHA-256; little-endian, in the
order of the global row ids), so that a million images load in less than a second.  `index.json`
contains the hash of `images.bin` and is written last: without it there is no data set.  Beyond `BLOCK_ROWS` rows it
contains a hash for each block of so many records too, and a reader fetches only the blocks of the rows that it reads.

Legend: N rows, S shards.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config.parse import reason
from ..config.sections import S3Config
from ..errors import UserError, redact
from ..storage.base import MissingObject, Store, TruncatedObject
from ..storage.open import open_store
from .codec import EXTENSIONS
from .labels import LABEL, Labels, LabelsEntry
from .left_out import MAX_REASONS, LeftOut, Text
from .records import BLOCK_ROWS, RECORD, Records

INDEX_FILE = "index.json"
IMAGES_FILE = "images.bin"
LABELS_FILE = "labels.bin"
HELD_OUT = "held-out"  # folder of the images that training does not see, below the data set's
FORMAT, VERSION = "glann-images", 1
_MAX_INDEX_BYTES = 64 << 20
_TAR_BLOCK = 512

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardFileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.tar$")]


class Shard(BaseModel):
    """One tar file: name, number of images, size in bytes and hash."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    file: ShardFileName
    rows: int = Field(ge=1, le=1 << 31)
    bytes: int = Field(ge=2 * _TAR_BLOCK, le=1 << 44)
    sha256: Sha256


class HeldOut(BaseModel):
    """The held-out part: a packed data set of its own, in the folder `HELD_OUT`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    rows: int = Field(ge=1, le=1 << 40)
    fingerprint: Sha256


class Header(BaseModel):
    """The contents of `index.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: Literal["glann-images"]
    version: Literal[1]
    name: str = Field(min_length=1, max_length=200)
    resolution: int = Field(ge=1, le=1 << 14)
    channels: Literal[1, 3]
    image_format: Literal["jpeg", "png", "webp"]
    rows: int = Field(ge=1, le=1 << 40)
    shards: tuple[Shard, ...] = Field(min_length=1)
    images_sha256: Sha256
    blocks: tuple[Sha256, ...] | None = Field(None, min_length=1)  # of every BLOCK_ROWS records, where there are more
    left_out: tuple[LeftOut, ...] = Field((), max_length=MAX_REASONS + 1)  # files of the source that are not in it
    remarks: dict[Text, Annotated[int, Field(ge=1)]] = Field({}, max_length=20)  # images taken in part, by reason
    held_out: HeldOut | None = None
    labels: LabelsEntry | None = None
    asset: str | None = Field(None, pattern=r"^[a-z0-9-]{1,100}$")  # the named asset that was packed
    recipe: Sha256  # hash of the source's contents and the packing options; equal hashes give equal bytes
    fingerprint: Sha256


@dataclass(frozen=True)
class Index:
    """A validated index. `records` have the fields of `RECORD`; `first_S` is the first row of each shard."""

    header: Header
    records: Records
    first_S: np.ndarray

    @property
    def records_N(self) -> np.ndarray:
        """The records of all rows, in memory: 44 bytes a row."""
        return self.records.whole()

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def resolution(self) -> int:
        return self.header.resolution

    @property
    def channels(self) -> int:
        return self.header.channels

    @property
    def image_format(self) -> str:
        return self.header.image_format

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.header.shards

    @property
    def rows(self) -> int:
        return self.header.rows

    @property
    def held_out(self) -> HeldOut | None:
        return self.header.held_out

    @property
    def labels(self) -> LabelsEntry | None:
        return self.header.labels

    @property
    def asset(self) -> str | None:
        """The named asset whose images these are; None of others, and of data packed by glann 0.1."""
        return self.header.asset

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the index, and through its hashes of the bytes of all shards."""
        return self.header.fingerprint

    def shard_of(self, row: int) -> int:
        """The number of the shard that contains `row`."""
        return int(np.searchsorted(self.first_S, row, side="right")) - 1

    def key(self, row: int) -> str:
        """The name of the row's image in its shard."""
        return image_key(row, self.image_format)

    def load_held_out(self, store: Store) -> Index:
        """Read the index of the held-out part, which this one must name, in its own store.

        Raises:
            UserError: it is not there, or not the one that this index names.
        """
        try:
            found = Index.load_from(store)
        except UserError as error:
            if not isinstance(error.__cause__, MissingObject):
                raise
            raise UserError(
                f"the held-out images of {self.name} are not at {store.url}; copy this folder with the data set, or "
                "pack it again"
            ) from error
        if self.held_out is None or found.fingerprint != self.held_out.fingerprint:
            raise UserError(f"{store.url} is not the held-out part of {self.name}; copy or pack the data set again")
        return found

    def read_labels(self, store: Store) -> Labels | None:
        """Read the labels of all rows from the store of the data set; None if it has none.

        Raises:
            UserError: they are missing, or not those that were packed.
        """
        if self.labels is None:
            return None
        shape = self.rows, len(self.labels.columns)
        try:
            fits = store.size(LABELS_FILE) == shape[0] * shape[1] * LABEL.itemsize
            data = store.read(LABELS_FILE) if fits else b""
        except MissingObject as error:
            raise UserError(f"{store.url} lacks {LABELS_FILE}; copy or pack the data set again") from error
        if not fits or hashlib.sha256(data).hexdigest() != self.labels.sha256:
            raise UserError(f"{store.url}/{LABELS_FILE} is damaged; copy or pack the data set again")
        return Labels(self.labels.columns, np.frombuffer(data, LABEL).reshape(shape))

    @staticmethod
    def load(url: str, s3: S3Config | None = None) -> Index:
        """Read and check the index at `url`.

        Raises:
            UserError: there is none, or it is truncated, inconsistent or malicious; in one line.
        """
        return Index.load_from(open_store(url, s3))

    @staticmethod
    def load_from(store: Store) -> Index:
        """Read and check the index in a store. Raises UserError as `load` does."""
        url = store.url
        try:
            _refuse_large(url, store.size(INDEX_FILE))
            header_bytes = store.read(INDEX_FILE)
        except MissingObject as error:
            hint = f"pack one with `glann data pack SOURCE {shlex.quote(redact(url))}`"
            if store.exists(PACKING_FILE):
                hint = f"{PACKING_FILE} is there: packing was interrupted, run the same `glann data pack` again"
            raise UserError(f"no data set at {url} ({hint})") from error
        header = _parse_header(header_bytes, url)
        try:
            _check_length(header, store.size(IMAGES_FILE), url)
            if header.blocks is not None:
                return Index(header, _blocks_of(header, store), _first_rows(header))
            records_bytes = store.read(IMAGES_FILE)
        except MissingObject as error:
            raise UserError(
                f"{url} lacks {IMAGES_FILE}, a part of its index; copy or pack the data set again"
            ) from error
        return parse(header_bytes, records_bytes, url)


PACKING_FILE = "packing.json"  # the state of an unfinished pack; removed after index.json is written


def held_out_url(url: str) -> str:
    """The address of the held-out part of the data set at `url`."""
    return f"{url.rstrip('/')}/{HELD_OUT}"


def image_key(row: int, image_format: str) -> str:
    """The member name of a row: at least nine digits, and the extension of the format."""
    return f"{row:09d}.{EXTENSIONS[image_format]}"


# What is said of the source, and what lies beside the images, which has hashes of its own, is no part of the data.
_NOT_DATA = ("fingerprint", "left_out", "remarks", "held_out", "labels", "asset")


def build(
    *,
    name: str,
    resolution: int,
    channels: int,
    image_format: str,
    shards: list[Shard],
    records: bytes,
    recipe: str,
    left_out: tuple[LeftOut, ...] = (),
    remarks: Mapping[str, int] | None = None,
    held_out: HeldOut | None = None,
    labels: LabelsEntry | None = None,
    asset: str | None = None,
) -> tuple[bytes, bytes]:
    """The bytes of `index.json` and `images.bin`.

    The last five, and the hashes of blocks, are written only where there are any: glann 0.1 does not read an index
    with them.
    """
    rows = sum(shard.rows for shard in shards)
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "resolution": resolution,
        "channels": channels,
        "image_format": image_format,
        "rows": rows,
        "shards": [shard.model_dump() for shard in shards],
        "images_sha256": hashlib.sha256(records).hexdigest(),
        "recipe": recipe,
    }
    if rows > BLOCK_ROWS:
        size = BLOCK_ROWS * RECORD.itemsize
        tree["blocks"] = [
            hashlib.sha256(records[start : start + size]).hexdigest() for start in range(0, len(records), size)
        ]
    tree["fingerprint"] = _fingerprint(tree)
    if left_out:
        tree["left_out"] = [group.model_dump() for group in left_out]
    if remarks:
        tree["remarks"] = dict(sorted(remarks.items()))
    if held_out:
        tree["held_out"] = held_out.model_dump()
    if labels:
        tree["labels"] = labels.model_dump(mode="json")
    if asset:
        tree["asset"] = asset
    return (json.dumps(tree, indent=1) + "\n").encode(), records


def _fingerprint(tree: dict) -> str:
    contents = {key: value for key, value in tree.items() if key not in _NOT_DATA}
    if contents.get("blocks") is None:  # of a small data set, and of any that was packed by glann 0.1
        contents.pop("blocks", None)
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(header_bytes: bytes, records_bytes: bytes, where: str) -> Index:
    """Parse and check an index from the bytes of its two files; `where` names it in errors. Raises UserError."""
    header = _parse_header(header_bytes, where)
    _check_length(header, len(records_bytes), where)
    if hashlib.sha256(records_bytes).hexdigest() != header.images_sha256:
        raise _damaged(where)
    records_N = np.frombuffer(records_bytes, RECORD)
    first_S = _first_rows(header)
    _check_records(header, records_N, first_S, where)
    return Index(header, Records.loaded(records_N), first_S)


def _first_rows(header: Header) -> np.ndarray:
    """The first row of each shard, int64 [S]."""
    rows_S = np.array([shard.rows for shard in header.shards], np.int64)
    return np.concatenate(([0], np.cumsum(rows_S)[:-1]))


def _blocks_of(header: Header, store: Store) -> Records:
    """The records of a large data set, each block of which is read and checked when it is first needed."""
    first_S, hashes = _first_rows(header), header.blocks or ()

    def read(number: int) -> np.ndarray:
        first = number * BLOCK_ROWS
        count = min(BLOCK_ROWS, header.rows - first)
        try:
            data = store.read_range(IMAGES_FILE, first * RECORD.itemsize, count * RECORD.itemsize)
        except (MissingObject, TruncatedObject) as error:
            raise UserError(f"{store.url}/{IMAGES_FILE} was changed or removed since the start ({error})") from error
        if hashlib.sha256(data).hexdigest() != hashes[number]:
            raise _damaged(store.url)
        records_K = np.frombuffer(data, RECORD)
        _check_records(header, records_K, first_S, store.url, first)
        return records_K

    return Records(header.rows, BLOCK_ROWS, read)


def _damaged(where: str) -> UserError:
    return UserError(f"{where}/{IMAGES_FILE} is damaged (wrong SHA-256); copy or pack the data set again")


def _check_length(header: Header, size: int, where: str) -> None:
    if size != header.rows * RECORD.itemsize:
        raise UserError(
            f"{where}/{IMAGES_FILE} has {size} bytes, not {RECORD.itemsize} for each of "
            f"{header.rows} rows: it is truncated or of another data set; copy or pack the data set again"
        )


def _refuse_large(where: str, size: int) -> None:
    if size > _MAX_INDEX_BYTES:
        raise UserError(f"{where}/{INDEX_FILE} is {size >> 20} MiB, too large for an index")


def _parse_header(data: bytes, where: str) -> Header:
    _refuse_large(where, len(data))
    try:
        header = Header.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        why = f"{place}: {reason(fault)}" if place else "truncated or not JSON"
        raise UserError(f"{where}/{INDEX_FILE} cannot be used ({why}); copy or pack the data set again") from error
    if header.fingerprint != _fingerprint(header.model_dump(mode="json")):
        raise UserError(f"{where}/{INDEX_FILE} was changed: its fingerprint does not fit; pack the data set again")
    if header.rows != sum(shard.rows for shard in header.shards):
        raise UserError(f"{where}/{INDEX_FILE} is wrong: the rows of its shards do not add up to {header.rows}")
    if len({shard.file for shard in header.shards}) != len(header.shards):
        raise UserError(f"{where}/{INDEX_FILE} is wrong: two shards have the same name")
    if header.blocks is not None and len(header.blocks) != -(-header.rows // BLOCK_ROWS):
        raise UserError(f"{where}/{INDEX_FILE} is wrong: it has {len(header.blocks)} hashes of blocks of records")
    return header


def _check_records(header: Header, records_K: np.ndarray, first_S: np.ndarray, where: str, first: int = 0) -> None:
    """Check that every image from row `first` on lies inside its shard, after the one before it. Raises UserError."""
    offset_K, length_K = records_K["offset"], records_K["length"].astype(np.uint64)
    bytes_S = np.array([shard.bytes for shard in header.shards], np.uint64)
    shard_K = np.searchsorted(first_S, np.arange(first, first + len(records_K)), side="right") - 1
    bytes_K = bytes_S[shard_K]
    fits_K = (length_K > 0) & (offset_K >= _TAR_BLOCK) & (offset_K <= bytes_K) & (length_K <= bytes_K - offset_K)
    follows_K = np.ones(len(records_K), bool)
    follows_K[1:] = (offset_K[1:] >= offset_K[:-1] + length_K[:-1]) | (shard_K[1:] != shard_K[:-1])
    if not (fits_K & follows_K).all():
        row = first + int(np.argmin(fits_K & follows_K))
        raise UserError(
            f"{where}/{IMAGES_FILE} is wrong: row {row} does not lie inside its shard; pack the data set again"
        )
