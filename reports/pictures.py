"""Pictures of a run: grids, reconstruction pairs, interpolation strips, nearest training images.

Small images are enlarged by an integer factor without smoothing, so that every pixel is visible as generated;
large ones are reduced.  Labels are in a margin at the left, never on an image.

Legend: N images, P pairs, S steps, H W pixels, C channels (1 or 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..storage.files import write_whole

Images = NDArray[np.uint8]

SMALLEST, LARGEST = 64, 256  # side of an image in a picture, in pixels
GAP = 4
PAPER, INK = (255, 255, 255), (60, 60, 60)
FONT_SIZE = 15


def grid(img_NHWC: Images, columns: int | None = None) -> Image.Image:
    """Grid of images in reading order; nearly square unless `columns` is given."""
    img_NHWC = _checked(img_NHWC)
    columns = columns or math.ceil(math.sqrt(len(img_NHWC)))
    if columns < 1:
        raise UserError(f"a grid of {columns} columns cannot be drawn")
    return labelled_rows([("", img_NHWC[start : start + columns]) for start in range(0, len(img_NHWC), columns)])


def reconstructions(real_NHWC: Images, fake_NHWC: Images, columns: int = 8) -> Image.Image:
    """Picture of each training image x with its reconstruction G(z) below it."""
    return _stacked([("x", real_NHWC), ("G(z)", fake_NHWC)], columns)


def nearest(sample_NHWC: Images, training_NHWC: Images, columns: int = 8) -> Image.Image:
    """Picture of each sample with its nearest training image below it."""
    return _stacked([("sample", sample_NHWC), ("nearest", training_NHWC)], columns)


def strips(img_PSHWC: Images) -> Image.Image:
    """Picture with one interpolation per row, from left to right."""
    return labelled_rows([("", img_SHWC) for img_SHWC in img_PSHWC])


def labelled_rows(rows: Sequence[tuple[str, Images]]) -> Image.Image:
    """Picture of rows of images of one size, each with an optional label at its left."""
    rows = [(label, _checked(img_NHWC)) for label, img_NHWC in rows]
    if not rows or len({img.shape[1:] for _, img in rows}) != 1:
        raise UserError("a picture needs at least one image, and all of one size")
    height, width = _shown_size(*rows[0][1].shape[1:3])
    margin = max((_text_width(label) for label, _ in rows), default=0)
    margin = margin + 2 * GAP if margin else 0
    columns = max(len(img_NHWC) for _, img_NHWC in rows)
    size = (margin + columns * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (label, img_NHWC) in enumerate(rows):
        top = GAP + number * (height + GAP)
        if label:
            draw.text((margin - GAP, top + height // 2), label, fill=INK, font=_font(), anchor="rm")
        for column, img_HWC in enumerate(img_NHWC):
            picture.paste(_shown(img_HWC, (width, height)), (margin + GAP + column * (width + GAP), top))
    return picture


def save(picture: Image.Image, path: Path, *, durable: bool = True) -> None:
    """Write a PNG atomically: a truncated one would break the report.

    Args:
        durable: as in `write_whole`.
    Raises:
        UserError, EnvironmentFault: the folder cannot be written to, or the disk is full.
    """
    write_whole(path, partial(picture.save, format="PNG"), durable=durable)


def _stacked(kinds: Sequence[tuple[str, Images]], columns: int) -> Image.Image:
    count = {len(img_NHWC) for _, img_NHWC in kinds}
    if len(count) != 1:
        raise UserError(f"pictures of pairs need as many images of each kind, not {sorted(count)}")
    rows = []
    for start in range(0, count.pop(), columns):
        rows += [(label, img_NHWC[start : start + columns]) for label, img_NHWC in kinds]
    return labelled_rows(rows)


def _checked(img_NHWC: Images) -> Images:
    if img_NHWC.dtype != np.uint8 or img_NHWC.ndim != 4 or img_NHWC.shape[3] not in (1, 3) or not len(img_NHWC):
        raise UserError(f"pictures are made of uint8 images [N, H, W, 1 or 3], not {img_NHWC.dtype} {img_NHWC.shape}")
    return img_NHWC


def _shown_size(height: int, width: int) -> tuple[int, int]:
    side = max(height, width)
    if side < SMALLEST:
        factor = math.ceil(SMALLEST / side)
        return height * factor, width * factor
    if side > LARGEST:
        return max(1, height * LARGEST // side), max(1, width * LARGEST // side)
    return height, width


def _shown(img_HWC: Images, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(img_HWC if img_HWC.shape[2] == 3 else np.repeat(img_HWC, 3, axis=2))
    enlarged = size[0] > image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _text_width(text: str) -> int:
    return math.ceil(_font().getlength(text)) if text else 0
