"""Zip and tar files as sources. Members are read in place by their offsets; nothing is extracted."""

from __future__ import annotations

import dataclasses
import logging
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

from ...errors import UserError, one_line
from ...storage.base import Store
from ...storage.seekable import open_file
from ..codec import BadImage
from ..left_out import MAX_PLACES, Tally
from .base import Item, Source, identity, member_name, natural
from .names import NoImages, Rules, Selection, extension

log = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 1 << 30  # larger members are decompression bombs, not images
MAX_FILE_BYTES = 1 << 50
MAX_HEADER_BYTES = 1 << 20  # of a tar header: a long name or a list of attributes
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def open_zip(store: Store, key: str, rules: Rules) -> Source:
    """The images of a zip file (StyleGAN's zips with `dataset.json` too; `--labels` reads its labels)."""
    where = f"{store.url}/{key}"
    try:
        with open_file(store, key) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{where} is not a complete zip file ({error})") from error
    names, selection, images = Names(where), Selection(rules), []
    for member in members:
        if member.filename.endswith(("/", "\\")):
            continue  # a folder
        name = names.checked(member.filename)
        if selection.takes(name, "a link" if stat.S_ISLNK(member.external_attr >> 16) else ""):
            _check_member(f"{where}: {name}", member)
            images.append((name, member))
    images.sort(key=lambda image: natural(image[0]))

    def items(start: int) -> Iterator[Item]:
        for name, member in images[start:]:
            yield Item(f"{where}: {name}", partial(_read_member, store, key, member))

    contents = [(name, member.file_size, member.CRC) for name, member in images]

    def beside(path: str) -> bytes | None:
        found = next((member for member in members if member.filename == path), None)
        if found is None:
            return None
        _check_member(f"{where}: {path}", found)
        try:
            return _read_member(store, key, found)
        except BadImage as error:
            raise UserError(f"{where}: {path}: {error}") from error

    source = _source(where, key, identity("zip", contents), selection, items, lambda: [name for name, _ in images])
    return dataclasses.replace(source, beside=beside)


def open_tar(store: Store, key: str, rules: Rules) -> Source:
    """The images of an uncompressed tar file."""
    where = f"{store.url}/{key}"
    names, selection, images = Names(where), Selection(rules), []
    with open_file(store, key) as file:
        for member in tar_members(file, where):
            if member.isdir():
                continue
            name = names.checked(member.name)
            if selection.takes(name, "" if member.isreg() else "not a regular file"):
                if member.sparse is not None or member.size > MAX_MEMBER_BYTES:
                    raise UserError(f"{where}: {name} is sparse or larger than an image may be; it is refused")
                images.append((name, member.size, member.offset_data))
    images.sort(key=lambda image: natural(image[0]))

    def items(start: int) -> Iterator[Item]:
        for name, size, place in images[start:]:
            yield Item(f"{where}: {name}", partial(store.read_range, key, place, size))

    hashed = identity("tar", [store.size(key), images])
    return _source(where, key, hashed, selection, items, lambda: [name for name, _, _ in images])


def open_archives(store: Store, keys: list[str], name: str, rules: Rules) -> Source:
    """The images of several zip and tar files, one file after the other in natural order: shards of a data set.

    Files without images are counted as left out.
    """
    sources, tally = [], Tally()
    for key in sorted(keys, key=natural):
        try:
            found = (open_zip if key.lower().endswith(".zip") else open_tar)(store, key, rules)
        except NoImages as error:
            tally.add_all(error.left_out)
            tally.add(extension(key))
            continue
        sources.append(found)
        tally.add_all(found.left_out)
    if not sources:
        raise NoImages(store.url, tally.groups())
    log.info("%d archives: %s ... %s", len(sources), sources[0].name, sources[-1].name)

    def items(start: int) -> Iterator[Item]:
        for source in sources:
            yield from source.items(min(start, source.count))
            start = max(0, start - source.count)

    hashed = identity("archives", [source.identity for source in sources])
    doubts = tuple(f"{source.name}: {doubt}" for source in sources for doubt in source.doubts)[:MAX_PLACES]

    def names() -> list[str]:
        return [name for source in sources if source.names for name in source.names()]

    return Source(name, sum(source.count for source in sources), hashed, items, tally.groups(), doubts, names)


class Names:
    """The member names of one archive: none leads out of it, none occurs twice."""

    def __init__(self, where: str) -> None:
        self._where, self._seen = where, set[str]()

    def checked(self, name: str) -> str:
        """The name as a path below the archive. Raises UserError."""
        inside = member_name(self._where, name)
        if inside in self._seen:
            raise UserError(f"{self._where} holds {inside!r} twice; it is refused")
        self._seen.add(inside)
        return inside


def tar_members(file: IO[bytes], where: str) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed, untrusted tar file; `where` names it in errors. Raises UserError.

    `tarfile` by itself allocates any amount of memory for a header, and may loop in a file with backward offsets.
    """
    headers: Any = _Headers(file)
    try:
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            at = -1
            while (member := archive.next()) is not None:
                if member.size < 0 or archive.offset <= at:
                    raise tarfile.ReadError(f"the size of {member.name[:100]!r} is negative")
                at = archive.offset
                yield member
    except (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError) as error:
        raise UserError(f"{where} is not a complete, uncompressed tar file ({one_line(error)})") from error


class _Headers:
    """A file that limits the size and offset of the headers that `tarfile` reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self.tell, self._file = file.tell, file

    def seek(self, offset: int) -> int:
        if not 0 <= offset <= MAX_FILE_BYTES:
            raise tarfile.ReadError(f"a member at byte {offset}")
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _source(where: str, key: str, hashed: str, selection: Selection, items, names) -> Source:
    if not selection.taken:
        raise NoImages(where, selection.left_out())
    name = key.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return Source(name, selection.taken, hashed, items, selection.left_out(), selection.doubts(), names)


def _check_member(where: str, member: zipfile.ZipInfo) -> None:
    if member.flag_bits & 0x1:
        raise UserError(f"{where} is encrypted; unpack the archive and pack the folder")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{where} is compressed in another way than deflate; unpack the archive and pack the folder")
    if max(member.file_size, member.compress_size) > MAX_MEMBER_BYTES:
        raise UserError(f"{where} is larger than an image may be; it is refused")


def _read_member(store: Store, key: str, member: zipfile.ZipInfo) -> bytes:
    """Read one member by two range reads: `zipfile` would serialise threads on one file, which is slow on S3."""
    header = _LOCAL_HEADER.unpack(store.read_range(key, member.header_offset, _LOCAL_HEADER.size))
    if header[0] != b"PK\x03\x04":
        raise BadImage("the zip file is damaged: no local header where its directory says")
    start = member.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
    data = store.read_range(key, start, member.compress_size) if member.compress_size else b""
    if member.compress_type == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.file_size + 1)
        except zlib.error as error:
            raise BadImage(f"the zip file is damaged ({error})") from error
    if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
        raise BadImage("the zip file is damaged: wrong length or checksum")
    return data
