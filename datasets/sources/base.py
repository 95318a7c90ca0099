"""Sources of images: folders, archives, idx and npz files, parquet, named assets, packed data sets.

A source is a fixed, ordered list of images.  It is read-only: archives are read member by member and
nothing is extracted.  Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...errors import UserError
from ...storage.base import check_key

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Item:
    """One image of a source: a name for messages and a function that reads its bytes or its pixels.

    `read` may be called from any thread; pixels are uint8 [H, W] or [H, W, C].
    """

    name: str
    read: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """An ordered list of `count` images. `identity` is a hash of the content of the source, not of its location."""

    name: str
    count: int
    identity: str
    items: Callable[[int], Iterator[Item]]  # the images from this position on


def is_image(key: str) -> bool:
    """Whether a file name is that of an image; hidden files and macOS resource forks are not."""
    name = key.rsplit("/", 1)[-1]
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and not key.startswith("__MACOSX/")


def safe_members(where: str, names: list[str]) -> None:
    """Raise UserError for member names that lead out of the archive's folder, or occur twice."""
    seen: set[str] = set()
    for name in names:
        try:
            check_key(name.removeprefix("./"))
        except UserError as error:
            raise UserError(f"{where} holds the hostile member name {name!r}; it is refused") from error
        if name in seen:
            raise UserError(f"{where} holds {name!r} twice; it is refused")
        seen.add(name)


def natural(key: str) -> tuple:
    """Sort key with numbers in names by value; ties by the name itself."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", key)], key


def identity(kind: str, contents: list) -> str:
    """A hash of the content of a source, to recognise it when packing is resumed."""
    return hashlib.sha256(json.dumps([kind, contents], separators=(",", ":")).encode()).hexdigest()
