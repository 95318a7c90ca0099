"""Pictures of more than 8 bits -> 8 bits, by the range that their values have.

A file of 16 bits rarely states how many of them it uses: 12-bit values (microscopes, scanners) would become
black. So a picture that stays below a quarter of its range is refused until the range is given.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFile

from ..codec import BadImage

WHOLE = 65535
_DARK = 1 << 14  # values below need at most 14 of 16 bits
_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B"}  # reads the lower byte of each value (little-endian)
_BITS, _PHOTOMETRIC, _LARGEST = 258, 262, 281  # TIFF tags


class UnknownRange(BadImage):
    """A picture of 16 bits that uses few of them: its range must be given."""


def load(image: ImageFile.ImageFile, data: bytes, levels: int | None) -> Image.Image:
    """Load the pixels of an opened picture, at 8 bits a channel.

    Args:
        levels: the largest value of 16-bit pictures that do not state it (PGM and some TIFF do); None: 65535 for
            a picture that uses more than a quarter of that.
    Raises:
        UnknownRange: `levels` is None, and the picture does not use more than a quarter.
        BadImage: a value above the largest; pixels without a range (32 bits, floats).
    """
    if image.format == "PPM" and (pixels := _binary_pnm(image, data, levels)) is not None:
        return pixels
    rawmode, maxval = _rawmode(image), _maxval(image)
    image.load()
    if image.mode in _GREY:
        value_HW = np.asarray(image, np.uint16)
        stated = _stated(image, int(value_HW.max())) if image.format == "TIFF" else None
        grey = to_eight_bits(value_HW, levels, stated)
        inverted = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0  # type: ignore[attr-defined]
        return _with_info(255 - grey if inverted else grey, image)
    if image.format == "PPM" and image.mode == "I":  # a text file; Pillow has scaled it from `maxval` to 65535
        return _with_info(to_eight_bits(np.asarray(image), levels, None if maxval == WHOLE else WHOLE), image)
    if image.mode in ("I", "F"):
        raise BadImage(f"pixels of mode {image.mode} have no known range; convert the image to 8 bits")
    if rawmode[-4:] in _OTHER_BYTE and image.mode in ("RGB", "RGBA"):
        return _sixteen_bit_colours(image, rawmode, data, levels)
    return image


def to_eight_bits(value: np.ndarray, levels: int | None, stated: int | None = None) -> np.ndarray:
    """Values 0 to `stated`, else 0 to `levels`, else 0 to 65535, as uint8: the upper 8 bits of the range."""
    largest = int(value.max())
    if stated is None and levels is None and 0 < largest < _DARK:
        bits = max(8, largest.bit_length())
        raise UnknownRange(
            f"the 16-bit values are at most {largest} ({largest.bit_length()} bits): give their range with "
            f"--levels {2**bits - 1}, or --levels {WHOLE} if the picture is so dark"
        )
    top = stated or levels or WHOLE
    if largest > top:
        raise BadImage(f"a value of {largest} is more than {'the file states' if stated else '--levels'} ({top})")
    return (value.astype(np.uint32) * 256 // (top + 1)).astype(np.uint8)


def _stated(image: Image.Image, largest: int) -> int | None:
    """The largest value that a TIFF states for its grey pixels: by its bits, or by a tag of its own."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(_BITS) == (12,):
        return 4095
    tag = tags.get(_LARGEST)
    tag = tag[0] if isinstance(tag, tuple) and tag else tag
    return tag if isinstance(tag, int) and max(largest, 255) <= tag < WHOLE else None


def _maxval(image: ImageFile.ImageFile) -> int:
    """The largest value that a PGM or PPM states."""
    tile = image.tile[0] if image.tile else None
    if tile and isinstance(tile.args, tuple) and tile.codec_name.startswith("ppm"):
        return int(tile.args[-1])
    return WHOLE if tile and image.mode == "I" else 255


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How Pillow unpacks the pixels, such as `RGB;16B`."""
    args = image.tile[0].args if image.tile else ""
    args = args[0] if isinstance(args, tuple) and args else args
    return args if isinstance(args, str) else ""


def _sixteen_bit_colours(image: Image.Image, rawmode: str, data: bytes, levels: int | None) -> Image.Image:
    """Pillow keeps the upper byte of each value; where the lower one matters, it is read too."""
    upper = np.asarray(image)
    brightest = int(upper[:, :, :3].max())
    if levels in (None, WHOLE) and (brightest >= _DARK >> 8 or levels):
        return image
    again = Image.open(io.BytesIO(data), formats=(str(image.format),))
    other = rawmode[:-4] + _OTHER_BYTE[rawmode[-4:]]
    for number, tile in enumerate(again.tile):
        args = (other, *tile.args[1:]) if isinstance(tile.args, tuple) else other
        again.tile[number] = tile._replace(args=args)
    try:
        again.load()
    except ValueError as error:  # grey with transparency: Pillow cannot read its lower bytes
        raise BadImage(f"of 16-bit {rawmode[:-4]} only the upper 8 bits can be read; convert it to 8 bits") from error
    value_HWC = upper.astype(np.uint16) << 8 | np.asarray(again)
    to_eight_bits(value_HWC[:, :, :3], levels)  # only the colours decide
    return _with_info(to_eight_bits(value_HWC, levels or WHOLE), image)


def _binary_pnm(image: ImageFile.ImageFile, data: bytes, levels: int | None) -> Image.Image | None:
    """PGM and PPM of two bytes a value; None for others. Pillow's own loop needs a second for a megapixel."""
    maxval = _maxval(image)
    if data[:2] not in (b"P5", b"P6") or image.mode not in ("I", "RGB") or maxval < 256:
        return None
    bands = 1 if image.mode == "I" else 3
    count, start = image.width * image.height * bands, image.tile[0].offset
    if len(data) - start < 2 * count:
        raise BadImage("image file is truncated")
    value = np.frombuffer(data, ">u2", count, start).reshape(image.height, image.width, bands)
    eight = to_eight_bits(value, levels, maxval if maxval < WHOLE else None)
    return _with_info(eight[:, :, 0] if bands == 1 else eight, image)


def _with_info(pixels: np.ndarray, image: Image.Image) -> Image.Image:
    made = Image.fromarray(np.ascontiguousarray(pixels))
    made.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return made
