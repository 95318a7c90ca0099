"""Sheets: pictures of many images, with the images themselves beside them where a picture shows them smaller.

    images/samples.png           the picture: every image, at most `pictures.LARGEST` pixels wide
    images/samples/00-03.webp    the image in row 0, column 3 at full size; only if it is larger

A worker makes tiles of its images, so no image leaves it uncompressed at full size; the driver puts sheets together.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..storage.files import os_fault, replacing_folder, write_whole
from . import pictures
from .pictures import GAP, LARGEST, Images, Rows

QUALITY = 90  # of WebP; an image of 1024 px takes 100 to 200 kB
NAME = re.compile(r"(\d{2,})-(\d{2,})\.webp")


@dataclass(frozen=True)
class Tile:
    """An image as a picture shows it, uint8 [h, w, C], and as a WebP file at full size if it is larger."""

    shown_HWC: Images
    whole: bytes = b""

    @classmethod
    def of(cls, img_HWC: Images) -> Tile:
        """The tile of an image, uint8 [H, W, C]."""
        height, width = img_HWC.shape[:2]
        if max(height, width) <= LARGEST:
            return cls(img_HWC.copy())
        whole, buffer = pictures.picture_of(img_HWC), io.BytesIO()
        whole.save(buffer, "WEBP", quality=QUALITY, method=4)
        shown = whole.resize(pictures.shown_size(height, width)[::-1], Image.Resampling.LANCZOS)
        shown_HWC = np.asarray(shown)
        return cls(shown_HWC if img_HWC.shape[2] == 3 else shown_HWC[:, :, :1].copy(), buffer.getvalue())


@dataclass(frozen=True)
class Sheet:
    """Rows of tiles of one size, each row with a label or an empty one; `pictures` has the layouts."""

    rows: Rows[Tile]

    def picture(self) -> Image.Image:
        """The picture of the sheet."""
        return pictures.labelled_rows([(label, [tile.shown_HWC for tile in row]) for label, row in self.rows])

    def save(self, path: Path) -> None:
        """Write the picture, a PNG, to `path`, and whole images into the folder of the same name.

        Raises:
            UserError, EnvironmentFault: the folder cannot be written to, or the disk is full.
        """
        wholes = {
            f"{row:02d}-{column:02d}.webp": tile.whole
            for row, (_, tiles) in enumerate(self.rows)
            for column, tile in enumerate(tiles)
            if tile.whole
        }
        folder = path.with_suffix("")
        try:
            if wholes:
                with replacing_folder(folder) as staging:
                    for name, content in wholes.items():
                        write_whole(staging / name, content, durable=False)
            elif folder.is_dir():
                shutil.rmtree(folder)
        except OSError as error:
            raise os_fault(error, folder) from error
        pictures.save(self.picture(), path)


@dataclass(frozen=True)
class Whole:
    """A whole image beside a picture, and where the picture shows it: left, top, width and height, as shares."""

    path: Path
    name: str
    box: tuple[float, float, float, float]


def tiles_of(img_NHWC: Iterable[Images]) -> list[Tile]:
    """The tiles of images."""
    return [Tile.of(img_HWC) for img_HWC in img_NHWC]


def wholes_of(path: Path, size: tuple[int, int]) -> list[Whole]:
    """The whole images beside the picture at `path`, in reading order.

    Args:
        size: width and height of the picture. Images of a picture have one size, and its label margin is at the left.
    """
    folder = path.with_suffix("")
    if not folder.is_dir():
        return []
    places = {
        (int(match[1]), int(match[2])): match[0] for each in folder.iterdir() if (match := NAME.fullmatch(each.name))
    }
    rows, columns = (max((place[axis] for place in places), default=0) + 1 for axis in (0, 1))
    width, height = size
    tall = (height - GAP) / rows
    wide = tall  # images are square
    found = []
    for (row, column), name in sorted(places.items()):
        left, top = width - (columns - column) * wide, GAP + row * tall
        box = left / width, top / height, (wide - GAP) / width, (tall - GAP) / height
        found.append(Whole(folder / name, f"row {row + 1}, column {column + 1}", box))
    return found
