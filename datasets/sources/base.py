"""Sources of images: folders, archives, idx and npz files, parquet, named assets, packed data sets.

A source is a fixed, ordered list of images.  It is read-only: archives are read member by member and
nothing is extracted.  Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UserError
from ..labels import Labels
from ..left_out import LeftOut


@dataclass(frozen=True)
class Item:
    """One image of a source: a name for messages and a function that reads its bytes or its pixels.

    `read` may be called from any thread; pixels are uint8 [H, W] or [H, W, C].
    """

    name: str
    read: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """An ordered list of `count` images, and what the source holds besides.

    `identity` is a hash of the images, not of their location nor of what is left out.

    names: of the images, as paths below the source; None where images have none. labels: of the images, if the source
    has some. held_out: a second source, of images that training must not see, if the source says which they are.
    beside: reads another file of the source by its path; None if there is none of that name.
    asset: the named asset that these images are of, by which their licence is known.
    """

    name: str
    count: int
    identity: str
    items: Callable[[int], Iterator[Item]]  # the images from this position on
    left_out: tuple[LeftOut, ...] = ()
    doubts: tuple[str, ...] = ()  # warnings: what is perhaps no picture, and how to leave it out
    names: Callable[[], Sequence[str]] | None = None
    labels: Labels | None = None
    held_out: Source | None = None
    beside: Callable[[str], bytes | None] | None = None
    asset: str | None = None


def member_name(where: str, name: str) -> str:
    """The name of an archive's member as a path below the archive, with forward slashes.

    Windows programs separate by backslashes. Nothing is extracted, and still a name that leads out of the
    archive's folder is hostile. Raises UserError.
    """
    parts = name.replace("\\", "/").split("/")
    inside = [part for part in parts if part not in ("", ".")]
    absolute = not parts[0] or re.fullmatch(r"[A-Za-z]:", parts[0])
    if absolute or not inside or ".." in inside or "\0" in name:
        raise UserError(f"{where} holds the hostile member name {name[:200]!r}; it is refused")
    return "/".join(inside)


def natural(key: str) -> tuple:
    """Sort key with the decimal numbers in names by value; ties by the name itself."""
    parts = re.split(r"([0-9]+)", key)  # texts and numbers in turn
    numbers = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = numbers
    return [(0, len(part), part) if at % 2 else (1, 0, part) for at, part in enumerate(parts)], key


def identity(kind: str, contents: list) -> str:
    """A hash of the content of a source, to recognise it when packing is resumed."""
    return hashlib.sha256(json.dumps([kind, contents], separators=(",", ":")).encode()).hexdigest()
