"""Pictures of a run: grids, reconstruction pairs, interpolation strips, nearest training images.

Small images are enlarged by an integer factor without smoothing, so that every pixel is visible as generated;
large ones are reduced unless `whole`.  Labels are in a margin at the left, never on an image.

Legend: N images, P pairs, S steps, H W pixels, C channels (1 or 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..storage.files import write_whole

Images = NDArray[np.uint8]
Item = TypeVar("Item")
Rows = list[tuple[str, Sequence[Item]]]  # of a picture, each with a label or an empty one

SMALLEST, LARGEST = 64, 256  # side of an image in a picture, in pixels
GAP = 4
PAPER, INK = (255, 255, 255), (60, 60, 60)
FONT_SIZE, FONT_SHARE = 15, 10  # pixels at least, and the part of an image's height that a label takes


def in_grid(items: Sequence[Item], columns: int | None = None) -> Rows[Item]:
    """Rows of a grid in reading order; nearly square unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(items)))
    return [("", items[start : start + columns]) for start in range(0, len(items), columns)]


def reconstructed(real: Sequence[Item], fake: Sequence[Item]) -> Rows[Item]:
    """Rows of each training image x with its reconstruction G(z) below it."""
    return in_pairs([("x", real), ("G(z)", fake)])


def beside_nearest(sample: Sequence[Item], training: Sequence[Item]) -> Rows[Item]:
    """Rows of each sample with its nearest training image below it."""
    return in_pairs([("sample", sample), ("nearest", training)])


def in_pairs(kinds: Sequence[tuple[str, Sequence[Item]]], columns: int = 8) -> Rows[Item]:
    """Rows of items of several kinds, with a label each, that belong together: one below the other."""
    count = {len(items) for _, items in kinds}
    if len(count) != 1:
        raise UserError(f"pictures of pairs need as many images of each kind, not {sorted(count)}")
    starts = range(0, count.pop(), columns)
    return [(label, items[start : start + columns]) for start in starts for label, items in kinds]


def grid(img_NHWC: Images, columns: int | None = None) -> Image.Image:
    """Grid of images in reading order; nearly square unless `columns` is given."""
    return labelled_rows(in_grid(list(_checked(img_NHWC)), columns))


def whole_grid(batches: Iterable[Images], count: int, columns: int | None = None) -> Image.Image:
    """Grid of `count` images, at least 1, at full size. Of their batches [B, H, W, C] one is in memory at a time.

    Raises:
        UserError: there are fewer images.
    """
    columns, picture = columns or math.ceil(math.sqrt(count)), None
    for number, img_HWC in enumerate(img_HWC for img_BHWC in batches for img_HWC in _checked(img_BHWC)):
        height, width = shown_size(*img_HWC.shape[:2], whole=True)
        picture = picture or Image.new("RGB", grid_size(count, img_HWC.shape[0], columns), PAPER)
        row, column = divmod(number, columns)
        place = GAP + column * (width + GAP), GAP + row * (height + GAP)
        picture.paste(_shown(img_HWC, (width, height)), place)
    if picture is None:
        raise UserError("a picture needs at least one image, and all of one size")
    return picture


def grid_size(count: int, side: int, columns: int | None = None) -> tuple[int, int]:
    """Width and height of the `whole_grid` of square images."""
    columns = columns or math.ceil(math.sqrt(count))
    pitch = shown_size(side, side, whole=True)[0] + GAP
    return min(columns, count) * pitch + GAP, math.ceil(count / columns) * pitch + GAP


def labelled_rows(rows: Rows[Images], *, whole: bool = False) -> Image.Image:
    """Picture of rows of images of one size, each with an optional label at its left.

    Args:
        whole: do not reduce large images.
    """
    arrays = [(label, _checked(np.asarray(images))) for label, images in rows]
    if not arrays or len({img.shape[1:] for _, img in arrays}) != 1:
        raise UserError("a picture needs at least one image, and all of one size")
    height, width = shown_size(*arrays[0][1].shape[1:3], whole=whole)
    font = _font(max(FONT_SIZE, height // FONT_SHARE))
    margin = max((math.ceil(font.getlength(label)) for label, _ in arrays if label), default=0)
    margin = margin + 2 * GAP if margin else 0
    columns = max(len(img_NHWC) for _, img_NHWC in arrays)
    size = (margin + columns * (width + GAP) + GAP, len(arrays) * (height + GAP) + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (label, img_NHWC) in enumerate(arrays):
        top = GAP + number * (height + GAP)
        if label:
            draw.text((margin - GAP, top + height // 2), label, fill=INK, font=font, anchor="rm")
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


def _checked(img_NHWC: Images) -> Images:
    if img_NHWC.dtype != np.uint8 or img_NHWC.ndim != 4 or img_NHWC.shape[3] not in (1, 3) or not len(img_NHWC):
        raise UserError(f"pictures are made of uint8 images [N, H, W, 1 or 3], not {img_NHWC.dtype} {img_NHWC.shape}")
    return img_NHWC


def shown_size(height: int, width: int, *, whole: bool = False) -> tuple[int, int]:
    """Height and width of an image in a picture."""
    side = max(height, width)
    if side < SMALLEST:
        factor = math.ceil(SMALLEST / side)
        return height * factor, width * factor
    if side > LARGEST and not whole:
        return max(1, height * LARGEST // side), max(1, width * LARGEST // side)
    return height, width


def picture_of(img_HWC: Images) -> Image.Image:
    """One image, as RGB."""
    return Image.fromarray(img_HWC if img_HWC.shape[2] == 3 else np.repeat(img_HWC, 3, axis=2))


def _shown(img_HWC: Images, size: tuple[int, int]) -> Image.Image:
    image = picture_of(img_HWC)
    enlarged = size[0] > image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
