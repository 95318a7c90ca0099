"""PNG files without what is not needed for their pixels.

Pillow refuses a file whose texts or colour profile unpack to more than 1 MB, although the pixels are whole.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 16 << 20  # bytes; profiles of printers have some 3 MB
MAX_TEXT = 1 << 20
_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"sRGB", b"eXIf"}
_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # keywords of texts that may hold it
_CHUNK = struct.Struct(">L4s")


class Parts(NamedTuple):
    """A PNG file for decoding, its colour profile (b"" if it cannot be unpacked), and whether it is animated."""

    kept: bytes
    profile: bytes | None
    animated: bool


def split(data: bytes) -> Parts:
    """Separate the pixels and orientation of a PNG from its profile, and drop the rest; damage is left as it is."""
    view, at, kept = memoryview(data), len(SIGNATURE), [memoryview(SIGNATURE)]
    profile, animated = None, False
    while at + 12 <= len(data):
        length, kind = _CHUNK.unpack_from(data, at)
        end = at + 12 + length
        if end > len(data):
            break
        body = view[at + 8 : end - 4]
        if kind == b"iCCP":
            profile = _profile(bytes(body))
        elif kind == b"acTL":
            animated = True
        elif kind in _KEPT or not kind[0] & 0x20 or (kind in (b"iTXt", b"zTXt", b"tEXt") and _is_wanted(kind, body)):
            kept.append(view[at:end])
        at = end
        if kind == b"IEND":
            return Parts(b"".join(kept), profile, animated)
    kept.append(view[at:])  # cut short: Pillow says where
    return Parts(b"".join(kept), profile, animated)


def _profile(body: bytes) -> bytes:
    """The unpacked profile of an iCCP chunk; b"" if it is damaged or too large."""
    packed = body.partition(b"\0")[2][1:]
    return _unpacked(packed, MAX_PROFILE)


def _unpacked(packed: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, limit)
    except zlib.error:
        return b""
    return data if unpacker.eof else b""


def _is_wanted(kind: bytes, body: memoryview) -> bool:
    """Whether a text chunk may hold the orientation, and Pillow can read it."""
    if not bytes(body[:24]).startswith(_ORIENTATION):
        return False
    keyword, _, rest = bytes(body).partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(rest) <= MAX_TEXT
    packed = rest[1:] if kind == b"zTXt" else rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return keyword in _ORIENTATION and bool(_unpacked(packed, MAX_TEXT))
