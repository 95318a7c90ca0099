"""Zip and tar files as sources. Members are read in place by their offsets; nothing is extracted."""

from __future__ import annotations

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
from .base import Item, Source, identity, is_image, natural, safe_members

MAX_MEMBER_BYTES = 1 << 30  # larger members are decompression bombs, not images
MAX_FILE_BYTES = 1 << 50
MAX_HEADER_BYTES = 1 << 20  # of a tar header: a long name or a list of attributes
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def open_zip(store: Store, key: str) -> Source:
    """The images of a zip file (StyleGAN's zips with `dataset.json` too; its labels are not used)."""
    where = f"{store.url}/{key}"
    try:
        with open_file(store, key) as file, zipfile.ZipFile(file) as archive:
            members = [m for m in archive.infolist() if not m.filename.endswith("/")]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{where} is not a complete zip file ({error})") from error
    safe_members(where, [member.filename for member in members])
    images = sorted((m for m in members if is_image(m.filename)), key=lambda m: natural(m.filename))
    for member in images:
        _check_member(f"{where}: {member.filename}", member)

    def items(start: int) -> Iterator[Item]:
        for member in images[start:]:
            yield Item(f"{where}: {member.filename}", partial(_read_member, store, key, member))

    contents = [(member.filename, member.file_size, member.CRC) for member in images]
    return _source(where, key, identity("zip", contents), len(images), items)


def open_tar(store: Store, key: str) -> Source:
    """The images of an uncompressed tar file."""
    where = f"{store.url}/{key}"
    with open_file(store, key) as file:
        members = list(tar_members(file, where))
    safe_members(where, [member.name for member in members if not member.isdir()])
    images = sorted((m for m in members if m.isreg() and is_image(m.name)), key=lambda m: natural(m.name))
    for member in images:
        if member.sparse is not None or member.size > MAX_MEMBER_BYTES:
            raise UserError(f"{where}: {member.name} is sparse or larger than an image may be; it is refused")

    def items(start: int) -> Iterator[Item]:
        for member in images[start:]:
            place, size = member.offset_data, member.size
            yield Item(f"{where}: {member.name}", partial(store.read_range, key, place, size))

    contents = [(member.name, member.size, member.offset_data) for member in images]
    return _source(where, key, identity("tar", [store.size(key), contents]), len(images), items)


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


def _source(where: str, key: str, hashed: str, count: int, items) -> Source:
    if not count:
        raise UserError(f"{where} holds no images")
    return Source(key.rsplit(".", 1)[0], count, hashed, items)


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
