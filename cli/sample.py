"""`glann sample` and `glann interpolate`: images of a trained model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .options import Device, Endpoint, SamplerName, Seed, SourceArg, Truncation, Unsigned, s3_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy import uint8
    from numpy.typing import NDArray

    from ..inference.model import SamplingModel

COPIES = 2  # in memory: the batches, and the array or grid that is made of them
SMALLEST_PNG = 67  # bytes


def sample(
    source: SourceArg,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="number of images")] = 64,
    seed: Seed = 0,
    truncation: Truncation = 1.0,
    sampler: SamplerName = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="x.png: a grid; x.npz: `images` uint8 \\[n, H, W, C]; else a folder of PNGs"),
    ] = Path("samples.png"),
    device: Device = "cpu",
    endpoint: Endpoint = None,
    unsigned: Unsigned = False,
) -> None:
    """Draw new images from a trained model.

    \b
    glann sample runs/digits --n 100 --seed 1 --out grid.png
    glann sample models:/faces@champion --n 10000 --out faces.npz --device cuda
    glann sample s3://bucket/runs/celebahq-1024/model --n 16 --truncation 0.8 --out folder
    """
    from ..tracking.source import load_model

    _check_out(out)
    model = load_model(source, s3=s3_at(endpoint, unsigned), device=device)
    if out.suffix:  # one file is made in memory, a folder is written image by image
        _require_memory(n, model, f"name a folder, which is written image by image: --out {out.with_suffix('')}")
    else:
        _require_disk(n, model, out)
    _save_images(model.stream(n, seed, truncation, sampler), out)
    typer.echo(f"{n} images of {model.resolution} px: {out}")


def interpolate(
    source: SourceArg,
    pairs: Annotated[int, typer.Option(min=1, help="number of pairs of images, one row each")] = 8,
    steps: Annotated[int, typer.Option(min=2, help="images per row, ends included")] = 8,
    seed: Seed = 0,
    truncation: Truncation = 1.0,
    sampler: SamplerName = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="x.png: one grid; x.npz; else a folder of PNGs")] = Path(
        "interpolation.png"
    ),
    device: Device = "cpu",
    endpoint: Endpoint = None,
    unsigned: Unsigned = False,
) -> None:
    """Draw interpolations between pairs of images, one row per pair.

    \b
    glann interpolate runs/faces-64 --pairs 6 --steps 10 --out faces.png
    """
    from ..tracking.source import load_model

    _check_out(out)
    model = load_model(source, s3=s3_at(endpoint, unsigned), device=device)
    _require_memory(pairs * steps, model, "give fewer --pairs or --steps")
    ends = [(2 * pair, 2 * pair + 1) for pair in range(pairs)]
    images_PSHWC = model.interpolate(ends, steps, seed, truncation, sampler)
    _save_images(iter(images_PSHWC), out, columns=steps)
    typer.echo(f"{pairs} interpolations of {steps} images: {out}")


def _check_out(out: Path) -> None:
    """Reject an output path that images cannot be saved to, before anything is computed."""
    import os

    from ..storage.open import require_local

    require_local(out, "--out")
    if out.suffix.lower() not in ("", ".png", ".npz"):
        raise UserError(f"--out {out}: use x.png for one grid, x.npz for an array, or a folder without a suffix")
    if out.suffix == "" and out.is_file():
        raise UserError(f"--out {out} is a file; name a folder, x.png or x.npz")
    if out.suffix and out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")
    candidates = (out, *out.parents) if out.suffix == "" else out.parents
    folder = next(path for path in (*candidates, Path("/")) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {folder} cannot be written to; make it writable, or give another --out")


def _require_memory(count: int, model: SamplingModel, remedy: str) -> None:
    """Refuse more images than fit into memory at once."""
    needed = COPIES * count * model.resolution**2 * model.channels
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > room:
        raise UserError(
            f"{count:,} images of {model.resolution} px need {needed / 1e9:,.0f} GB of memory, and this machine has "
            f"{room / 1e9:,.0f} GB; {remedy}"
        )


def _require_disk(count: int, model: SamplingModel, out: Path) -> None:
    """Refuse more images than a folder can take even if each is as small as a PNG can be."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    needed, room = SMALLEST_PNG * count, shutil.disk_usage(there).free
    if needed > room:
        raise UserError(
            f"{count:,} images of {model.resolution} px need at least {needed / 1e9:,.0f} GB, and {there} has "
            f"{room / 1e9:,.0f} GB left; draw fewer"
        )


def _save_images(batches: Iterable[NDArray[uint8]], out: Path, columns: int | None = None) -> None:
    """Save batches [B, H, W, C] as one grid (x.png), one array (x.npz) or a folder of PNGs; `out` decides."""
    import numpy as np
    from PIL import Image

    from ..reports.pictures import grid, save
    from ..storage.files import write_whole

    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() == ".png":
        save(grid(np.concatenate(list(batches)), columns), out)
    elif out.suffix.lower() == ".npz":
        images_NHWC = np.concatenate(list(batches))
        write_whole(out, lambda file: np.savez_compressed(file, images=images_NHWC))
    else:
        numbered = enumerate(image_HWC for batch in batches for image_HWC in batch)
        for number, image_HWC in numbered:  # there may be 50,000 files: no sync for each
            picture = Image.fromarray(image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC)
            save(picture, out / f"{number:06d}.png", durable=False)
