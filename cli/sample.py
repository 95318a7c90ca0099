"""`glann sample` and `glann interpolate`: images of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Checkpoint, Device, Endpoint, SamplerName, Seed, SourceArg, Truncation, Unsigned, s3_at
from .saving import check_out, require_room, save_images, watched

if TYPE_CHECKING:
    from ..config.sections import S3Config
    from ..inference.model import SamplingModel

GRID = Path("samples.png")  # where samples go by default


def sample(
    source: SourceArg,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="number of images")] = 64,
    seed: Seed = 0,
    truncation: Truncation = 1.0,
    sampler: SamplerName = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="x.png: a grid; x.npz: `images` uint8 \\[n, H, W, C]; else a folder of PNGs. Empty: samples.png, or "
            "the folder samples for images of more than 256 px",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    endpoint: Endpoint = None,
    unsigned: Unsigned = False,
) -> None:
    """Draw new images from a trained model.

    \b
    glann sample runs/digits --n 100 --seed 1 --out grid.png
    glann sample models:/faces@champion --n 10000 --out faces.npz --device cuda
    glann sample s3://bucket/runs/celebahq-1024/model --n 16 --truncation 0.8 --out folder
    glann sample runs/faces-64 --checkpoint best

    Images are written as the model makes them, never reduced; small ones are enlarged in a grid. Arrays and folders are
    written batch by batch, in little memory.
    """
    from ..reports.pictures import LARGEST

    check_out(out or GRID)
    model = _load_model(source, checkpoint, s3_at(endpoint, unsigned), device)
    if out is None:
        out = GRID if model.resolution <= LARGEST else GRID.with_suffix("")
        check_out(out)
    folder = f"name a folder, which is written image by image: --out {out.with_suffix('')}"
    require_room(n, model, out, "draw fewer", for_grid=folder)
    save_images(watched(model.stream(n, seed, truncation, sampler), n), n, out)
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
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    endpoint: Endpoint = None,
    unsigned: Unsigned = False,
) -> None:
    """Draw interpolations between pairs of images, one row per pair.

    \b
    glann interpolate runs/faces-64 --pairs 6 --steps 10 --out faces.png
    glann interpolate runs/celebahq-1024 --pairs 100 --out folder

    Images are written as the model makes them; arrays and folders batch by batch, in little memory.
    """
    check_out(out)
    model = _load_model(source, checkpoint, s3_at(endpoint, unsigned), device)
    count = pairs * steps
    require_room(count, model, out, "give fewer --pairs or --steps", columns=steps)
    ends = [(2 * pair, 2 * pair + 1) for pair in range(pairs)]
    batches = model.stream_interpolations(ends, steps, seed, truncation, sampler)
    save_images(watched(batches, count), count, out, columns=steps)
    typer.echo(f"{pairs} interpolations of {steps} images: {out}")


def _load_model(source: str, checkpoint: str | None, s3: S3Config, device: str) -> SamplingModel:
    """The packaged model of a source, or that of a checkpoint of a run."""
    if checkpoint is None:
        from ..tracking.source import load_model

        return load_model(source, s3=s3, device=device)
    from ..trainers.run.packaging import open_checkpoint

    opened = open_checkpoint(source, checkpoint, s3=s3, device=device)
    typer.echo(f"checkpoint of step {opened.step}, by sampler {opened.model.own}")
    return opened.model
