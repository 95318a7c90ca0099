"""The state of an unfinished pack: `packing.json`, which is written once, and a file beside every finished shard.

So a shard adds a file of a few kilobytes, however many there are, and a resumed pack takes the index records of
finished shards from these files and need not read the shards again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UserError
from ..storage.base import Store
from .index import PACKING_FILE, Sha256, Shard
from .left_out import Text
from .records import RECORD

T = TypeVar("T")
REQUESTS = 16  # at a time: 100,000 in sequence take an hour
ENTRY = ".packed"  # in place of `.tar`


class FinishedShard(BaseModel):
    """A finished shard, the position in the source after its last image, and the remarks on images up to there.

    records: hash of the index records of its images; earlier versions did not keep them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    shard: Shard
    position: int = Field(ge=1)
    remarks: dict[Text, Annotated[int, Field(ge=1)]] = Field({}, max_length=20)
    records: Sha256 | None = None


class Packing(BaseModel):
    """An unfinished pack, and the contents of `packing.json`, where earlier versions listed the finished shards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    recipe: Sha256
    finished: tuple[FinishedShard, ...] = ()

    @model_validator(mode="after")
    def _counted(self) -> Packing:
        """A shard's images lie between the position behind the one before and its own."""
        rows = before = 0
        for shard in self.finished:
            rows += shard.shard.rows
            if shard.position < rows or shard.position <= before:
                raise ValueError("the positions of the shards do not fit their images")
            before = shard.position
        return self


Records = dict[str, bytes]  # the index records of a shard's images, by its file


def begin(store: Store, recipe: str, images: int) -> tuple[Packing, Records]:
    """Read the state of the unfinished part in a store, or create a new one.

    Raises:
        UserError: the state is of another pack, or cannot be read; or other files are there.
    """
    present = store.list()
    if PACKING_FILE not in present:
        if present:
            raise UserError(f"{store.url} is not empty (it holds {present[0]}); choose an empty destination")
        packing = Packing(recipe=recipe)
        store.write(PACKING_FILE, packing.model_dump_json().encode(), only_if_absent=True)
        return packing, {}
    reading = PACKING_FILE
    try:
        packing = Packing.model_validate_json(store.read(PACKING_FILE))
        finished, records = list(packing.finished), {}
        keys = [key for key in present if key.endswith(ENTRY) and "/" not in key]  # not those of held-out/
        for reading, data in zip(keys, together(store.read, keys), strict=True):
            entry, records[entry.shard.file] = parse(data)
            if entry_of(entry.shard) != reading:
                raise ValueError("it is of another shard")
            finished.append(entry)
        reading = PACKING_FILE
        packing = Packing(recipe=packing.recipe, finished=tuple(finished))
        if packing.finished and packing.finished[-1].position > images:
            raise ValueError("it is ahead of the source")
    except ValueError as error:
        raise UserError(f"{store.url}/{reading} cannot be read; delete the destination and pack again") from error
    if packing.recipe != recipe:
        raise UserError(
            f"{store.url} holds an unfinished pack of another source, with other options or of another version; "
            "run that command again, choose another destination or delete it"
        )
    return packing, records


def entry_of(shard: Shard) -> str:
    """The file beside a finished shard."""
    return shard.file.removesuffix(".tar") + ENTRY


def entry_bytes(shard: Shard, position: int, remarks: dict[str, int], records: bytes) -> bytes:
    """The contents of that file: a line of JSON, and the index records of the shard's images."""
    digest = hashlib.sha256(records).hexdigest()
    finished = FinishedShard(shard=shard, position=position, remarks=remarks, records=digest)
    return finished.model_dump_json().encode() + b"\n" + records


def parse(data: bytes) -> tuple[FinishedShard, bytes]:
    """Read `entry_bytes`. Raises ValueError."""
    line, _, records = data.partition(b"\n")
    finished = FinishedShard.model_validate_json(line)
    if len(records) != finished.shard.rows * RECORD.itemsize:
        raise ValueError("it has records of another number of images")
    if hashlib.sha256(records).hexdigest() != finished.records:
        raise ValueError("its records are damaged")
    return finished, records


def together(call: Callable[[str], T], keys: Iterable[str]) -> list[T]:
    """Call with every key, several at a time; raises the error of the first that failed."""
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="glann-pack-entry") as pool:
        return list(pool.map(call, keys))
