"""Saving of drawn images at full size: a grid, an array or a folder. Only a grid is in memory as a whole."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

    from ..inference.model import SamplingModel

LARGEST_GRID = 178_956_970  # pixels; Pillow, and so most programs in Python, refuse to read more
SMALLEST_PNG = 67  # bytes
DEFLATED = 1032  # times smaller, at most
GRID, ARRAY = ".png", ".npz"


def check_out(out: Path) -> None:
    """Reject an output path that images cannot be saved to, before anything is computed. Raises UserError."""
    from ..storage.open import require_local

    require_local(out, "--out")
    if out.suffix.lower() not in ("", GRID, ARRAY):
        raise UserError(f"--out {out}: use x.png for one grid, x.npz for an array, or a folder without a suffix")
    if out.suffix == "" and out.is_file():
        raise UserError(f"--out {out} is a file; name a folder, x.png or x.npz")
    if out.suffix and out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")
    candidates = (out, *out.parents) if out.suffix == "" else out.parents
    folder = next(path for path in (*candidates, Path("/")) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {folder} cannot be written to; make it writable, or give another --out")


def require_room(
    count: int, model: SamplingModel, out: Path, remedy: str, for_grid: str | None = None, columns: int | None = None
) -> None:
    """Refuse a grid that is too large, and more images than fit on the disk at the least.

    Args:
        remedy: what to do, in the imperative. for_grid: where it differs for a grid. columns: of a grid.
    Raises:
        UserError: there are too many.
    """
    from ..reports.pictures import grid_size

    what = f"{count:,} images of {model.resolution} px"
    if out.suffix.lower() == GRID:
        width, height = grid_size(count, model.resolution, columns)
        if width * height > LARGEST_GRID:
            raise UserError(
                f"{what} make a picture of {width:,} x {height:,} px, too large for most programs; {for_grid or remedy}"
            )
        return
    at_least = SMALLEST_PNG if out.suffix == "" else math.ceil(model.resolution**2 * model.channels / DEFLATED)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    needed, room = at_least * count, shutil.disk_usage(there).free
    if needed > room:
        raise UserError(
            f"{what} need at least {needed / 1e9:,.0f} GB, and {there} has {room / 1e9:,.0f} GB left; {remedy}"
        )


def save_images(batches: Iterable[NDArray[uint8]], count: int, out: Path, columns: int | None = None) -> None:
    """Save `count` images, at least 1, from batches [B, H, W, C]: `out` decides the form.

    Args:
        columns: of a grid; None makes it nearly square.
    Raises:
        UserError, EnvironmentFault: `out` cannot be written to, or the disk is full.
    """
    from ..reports.pictures import save, whole_grid
    from ..storage.files import write_whole

    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() == GRID:
        save(whole_grid(batches, count, columns), out)
    elif out.suffix.lower() == ARRAY:
        write_whole(out, lambda file: _write_npz(file, batches, count))
    else:
        _save_folder(batches, out)


def _write_npz(file: IO[bytes], batches: Iterable[NDArray[uint8]], count: int) -> None:
    """Write an npz file of one array `images`, batch by batch: `numpy.savez` needs it in memory as a whole."""
    import zipfile

    import numpy as np

    remaining = iter(batches)
    first = next(remaining)  # for its shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape[1:])}
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for img_BHWC in chain([first], remaining):
            member.write(img_BHWC.tobytes())


def _save_folder(batches: Iterable[NDArray[uint8]], out: Path) -> None:
    """Save images as PNGs, those of a batch on all cores: compression takes half a second at 1024 px."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    from ..reports.pictures import save

    def save_one(numbered: tuple[int, NDArray[uint8]]) -> None:
        number, image_HWC = numbered
        picture = Image.fromarray(image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC)
        save(picture, out / f"{number:06d}.png", durable=False)  # there may be 50,000 files: no sync for each

    start = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for img_BHWC in batches:
            list(pool.map(save_one, enumerate(img_BHWC, start)))  # the errors too
            start += len(img_BHWC)


def watched(batches: Iterable[NDArray[uint8]], count: int) -> Iterator[NDArray[uint8]]:
    """The batches, with progress on stderr."""
    from .progress import counted

    done = 0
    with counted("drawing", "images") as on_images:
        for img_BHWC in batches:
            yield img_BHWC
            done += len(img_BHWC)
            on_images(done, count)
