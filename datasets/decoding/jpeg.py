"""Complete JPEG files: libjpeg paints over what is missing and warns; Pillow does not report the warning."""

from __future__ import annotations

import numpy as np
import simplejpeg
from PIL import Image

from ..codec import BadImage

_COLOURS = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode -> simplejpeg's
# libjpeg's warnings of missing or damaged pixels. Others are harmless, such as bytes before a marker.
_HARMFUL = ("premature end", "bad huffman code", "instead of rst")
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
        image.load()  # a harmless warning, or a form that only Pillow reads
        return image
    if img_HWC.shape[:2] != (image.height, image.width):
        raise BadImage("the JPEG has two sizes")
    if image.mode == "CMYK":
        image.load()  # Pillow knows Adobe's inverted inks
        return image
    loaded = Image.fromarray(np.ascontiguousarray(img_HWC[:, :, 0]) if image.mode == "L" else img_HWC)
    loaded.info = image.info
    return loaded
