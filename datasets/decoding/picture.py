"""Bytes of a picture in any format that is read here -> 8-bit sRGB or grey, upright, on white.

A picture is complete or refused: nothing is guessed, and what is passed over is counted as a remark.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError, features

from ...errors import one_line
from ..codec import BadImage
from . import depth, jpeg, png
from .colour import to_srgb

# Formats that Pillow decodes itself in compiled code, and recognises by their first bytes. Others run external
# programs (EPS), are decoded by Python loops (QOI) or have no signature (TGA).
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "PPM": (".pgm", ".ppm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf"),
}
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp", "TIFF": "libtiff"}  # parts of Pillow
READABLE = tuple(name for name in _SUFFIXES if name not in _OPTIONAL or features.check(_OPTIONAL[name]))
SUFFIXES = tuple(suffix for name in READABLE for suffix in _SUFFIXES[name])
MAX_PIXELS = 80_000_000  # a larger picture is refused before it is decompressed

# What is said of a picture that is taken although a part of it was not understood.
PROFILE = "with an unusable colour profile, taken as sRGB"
EXIF = "with a damaged EXIF block, not turned"
FRAMES = "with several pictures inside, of which the first is taken"
GAMMA = "with a gamma of its own, which is not applied"
_SRGB_GAMMA = 0.45455

# Pillow warns of damaged metadata on stderr, without the name of the file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class Picture(NamedTuple):
    """A decoded picture, RGB or L (grey), and remarks on what was passed over."""

    image: Image.Image
    remarks: tuple[str, ...] = ()


def decode_any(data: bytes, levels: int | None = None) -> Picture:
    """Decode `data`; rotate by EXIF, convert to sRGB by the colour profile, composite transparency on white.

    Args:
        levels: the largest value of 16-bit pictures that do not state it; see `depth.to_eight_bits`.
    Raises:
        UnknownRange: a 16-bit picture so dark that its range must be given.
        BadImage: not a complete picture of a readable format with at most MAX_PIXELS.
    """
    try:
        return _decode(data, levels)
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its own message shows an object in memory
        raise BadImage(f"not a {', '.join(READABLE[:-1])} or {READABLE[-1]}, or damaged at its beginning") from error
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        raise BadImage(f"not a readable image ({one_line(error)})") from error


def is_picture(data: bytes) -> bool:
    """Whether the bytes begin like a picture of a readable format."""
    try:
        kept = png.split(data).kept if data.startswith(png.SIGNATURE) else data
        Image.open(io.BytesIO(kept), formats=READABLE)
    except Exception:  # as above
        return False
    return True


def _decode(data: bytes, levels: int | None) -> Picture:
    parts = png.split(data) if data.startswith(png.SIGNATURE) else None
    source = parts.kept if parts else data
    opened = Image.open(io.BytesIO(source), formats=READABLE)
    if opened.width * opened.height > MAX_PIXELS:
        raise BadImage(f"{opened.width} x {opened.height} pixels; the limit is {MAX_PIXELS}")
    profile = parts.profile if parts else opened.info.get("icc_profile") or None
    remarks = []
    if parts.animated if parts else _is_animated(opened):
        remarks.append(FRAMES)
    gamma = opened.info.get("gamma")
    if gamma and profile is None and "srgb" not in opened.info and abs(gamma - _SRGB_GAMMA) > 0.05:
        remarks.append(GAMMA)
    image = jpeg.load(opened, data) if opened.format in ("JPEG", "MPO") else depth.load(opened, source, levels)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _on_white(image)
    if profile is not None:
        converted = to_srgb(image, profile)
        if converted is None:
            remarks.append(PROFILE)
        else:
            converted.info = image.info
            image = converted
    if image.mode not in ("RGB", "L"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    try:
        return Picture(ImageOps.exif_transpose(image), tuple(remarks))
    except Exception:  # Pillow parses EXIF here; the pixels are whole
        return Picture(image, (*remarks, EXIF))


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    opaque.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return opaque.convert("L") if image.mode in ("1", "L", "LA", "La") else opaque


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second picture
        return False
