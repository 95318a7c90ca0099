"""Common parts of all HTML pages and cards: templates, embedded images, formatted numbers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from ..errors import UserError
from ..storage.files import write_whole

MAX_PNG_BYTES = 200_000
WEBP_QUALITY = 88
SHOWN_WIDTH = 1600  # pixels of an embedded picture: twice as many as most pages show, for sharp screens


@dataclass(frozen=True)
class Figure:
    """An embedded image with its title, and its size in pixels."""

    title: str
    source: Markup
    width: int
    height: int


def environment(*folders: Path) -> jinja2.Environment:
    """Jinja environment of the templates in `folders` and here; values in HTML are escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["duration"] = duration
    made.filters["number"] = number
    return made


def write_page(path: Path, text: str) -> Path:
    """Write a page as UTF-8; undecodable bytes of file names become backslash escapes."""
    write_whole(path, text.encode("utf-8", "backslashreplace"))
    return path


def figure(path: Path, title: str, widest: int = SHOWN_WIDTH) -> Figure:
    """A PNG or WebP file as an embedded image; a large PNG becomes WebP to keep the report small enough for e-mail.

    Args:
        widest: in pixels; a wider picture is reduced.
    Raises:
        UserError: the file is not a readable PNG or WebP.
    """
    with readable(path) as image:
        content, kind, size = path.read_bytes(), str(image.format).lower(), image.size
        if image.width > widest or (kind == "png" and len(content) > MAX_PNG_BYTES):
            (content, size), kind = as_webp(image, widest), "webp"
    source = Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
    return Figure(title, source, *size)


def as_webp(image: Image.Image, widest: int) -> tuple[bytes, tuple[int, int]]:
    """A picture of at most `widest` pixels width as WebP, and its width and height."""
    whole, buffer = image.convert("RGB"), io.BytesIO()
    whole.thumbnail((widest, image.height), Image.Resampling.LANCZOS)
    whole.save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
    return buffer.getvalue(), whole.size


@contextmanager
def readable(path: Path) -> Iterator[Image.Image]:
    """The picture in a PNG or WebP file. Raises UserError if it is none."""
    try:
        with Image.open(path, formats=["PNG", "WEBP"]) as image:
            yield image
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable picture: {error}; remove it and try again") from error


def duration(seconds: float) -> str:
    """Format seconds as `3.2 s`, `4 min 05 s` or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: float) -> str:
    """Format with three significant digits; large numbers and integers in full with thousands separators."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
