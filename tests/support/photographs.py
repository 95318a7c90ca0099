"""Real photographs of 1024 px and more: 39 of animals and of the sea, which Debian's package gcompris-qt-data carries.

The package says who made them; nothing of them is kept in the repository.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from glann.datasets.assets.downloads import DebianPackage
from PIL import Image

PACKAGE = DebianPackage("gcompris-qt-data", "usr/share/gcompris-qt/rcc")
FILES = ("erase.rcc", "clickgame.rcc")
SIDE = 1024


def write_photographs(folder: Path, count: int, work: Path) -> None:
    """Write so many photographs to a folder as WebP files, as their package has them. `work`: for the package."""
    unpacked = work / "rcc"
    unpacked.mkdir(parents=True)
    PACKAGE.obtain(FILES, unpacked)
    folder.mkdir(parents=True)
    written = 0
    for file in FILES:
        for bytes_of_one in _webp(unpacked.joinpath(file).read_bytes()):
            if written < count and min(Image.open(io.BytesIO(bytes_of_one)).size) >= SIDE:
                (folder / f"{written:03d}.webp").write_bytes(bytes_of_one)
                written += 1
    if written < count:
        raise ValueError(f"{PACKAGE} has {written} photographs of {SIDE} px, {count} are needed")


def _webp(resources: bytes) -> list[bytes]:
    """The WebP files in a file of Qt resources, where they lie uncompressed."""
    found = re.finditer(rb"RIFF(....)WEBP", resources, re.DOTALL)
    return [resources[one.start() : one.start() + 8 + int.from_bytes(one[1], "little")] for one in found]
