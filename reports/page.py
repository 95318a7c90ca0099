"""What every page that glann writes shares: the frame `page.html`, pictures in the text, numbers as people say them."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from ..errors import UserError
from ..storage.files import write_whole

MAX_PNG_BYTES = 200_000
WEBP_QUALITY = 88


@dataclass(frozen=True)
class Figure:
    """An image with its text."""

    title: str
    source: Markup
    width: int
    height: int


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of `folders` and of this one; whatever is put into HTML is escaped."""
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
    """Write a page. Names of files that are not text are written with backslashes."""
    write_whole(path, text.encode("utf-8", "backslashreplace"))
    return path


def figure(path: Path, title: str) -> Figure:
    """The picture as part of the page; big ones are packed as WebP so that a report can be sent by mail.

    Raises:
        UserError: it is not a picture.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            kind = "png"
            if len(content) > MAX_PNG_BYTES:
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
                content, kind = buffer.getvalue(), "webp"
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be shown: {error}; remove it and try again") from error
    source = Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
    return Figure(title, source, width, height)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: float) -> str:
    """Three significant digits, with separators where it is large."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
