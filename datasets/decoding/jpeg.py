"""Complete JPEG files: libjpeg paints over what is missing and warns; Pillow does not report the warning."""

from __future__ import annotations

import re

import numpy as np
import simplejpeg
from PIL import Image

from ..codec import BadImage

_COLOURS = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode -> simplejpeg's
# libjpeg's warnings of missing or damaged pixels. Others are harmless, such as bytes before a marker.
_HARMFUL = ("premature end", "bad huffman code", "instead of rst", "suspension not allowed")
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in scans, other bytes follow 0xff
_SOF_PROGRESSIVE, _SOS, _EOI = 0xC2, 0xDA, 0xD9
MAX_SCANNED = 4_000_000_000  # pixels times scans; a progressive file of a few kB can ask for hours


def load(image: Image.Image, data: bytes) -> Image.Image:
    """The pixels of an opened JPEG, with its metadata. Raises BadImage if any pixel is missing or damaged."""
    scans = data.count(b"\xff\xda")
    if scans * image.width * image.height > MAX_SCANNED:
        raise BadImage(f"a JPEG of {scans} scans over {image.width} x {image.height} pixels")
    try:
        img_HWC = simplejpeg.decode_jpeg(data, _COLOURS[image.mode])
    except ValueError as error:
        reason = str(error)
        if any(word in reason.lower() for word in _HARMFUL):
            raise BadImage(f"the JPEG is cut short or damaged ({reason})") from error
        image.load()  # a harmless warning, or a form that only Pillow reads, such as CMYK of two resolutions
        return image
    if not _is_refined(data):
        raise BadImage("the progressive JPEG is cut short: its last scans are missing")
    if img_HWC.shape[:2] != (image.height, image.width):
        raise BadImage("the JPEG has two sizes")
    if image.mode == "CMYK":
        image.load()  # Pillow knows Adobe's inverted inks
        return image
    loaded = Image.fromarray(np.ascontiguousarray(img_HWC[:, :, 0]) if image.mode == "L" else img_HWC)
    loaded.info = image.info
    return loaded


def _is_refined(data: bytes) -> bool:
    """Whether the scans of a progressive JPEG reach the last bit of every coefficient; True for other JPEGs.

    Between two scans a file can be cut without a warning: what remains is a coarser picture.
    """
    at, components, exact = 2, 0, set[tuple[int, int]]()  # (component, coefficient) known to the last bit
    while found := _MARKER.search(data, at):
        kind, at = data[found.start() + 1], found.end()
        if kind == _EOI or at + 2 > len(data):
            break
        if kind in (0x01, 0xD8):  # without a segment
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        segment, at = data[at + 2 : at + length], at + max(2, length)
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC) and not components:
            if kind != _SOF_PROGRESSIVE or len(segment) < 6:
                return True
            components = segment[5]
        if kind == _SOS and segment and len(segment) >= 4 + 2 * segment[0]:
            first, last, bits = segment[1 + 2 * segment[0] :][:3]
            if bits & 15 == 0:
                names = segment[1 : 1 + 2 * segment[0] : 2]
                exact.update((name, place) for name in names for place in range(first, min(last, 63) + 1))
    return len(exact) >= components * 64
