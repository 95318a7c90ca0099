"""`glann data`: pack images into shards, describe and verify data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from ..errors import ExitStatus
from .options import Endpoint, Unsigned, s3_at

data_app = typer.Typer(no_args_is_help=True, help="Pack images into shards, describe and verify data sets.")


class Format(StrEnum):
    """Formats of packed images."""

    jpeg = "jpeg"
    png = "png"
    webp = "webp"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="folder, zip, tar, idx, npz, parquet, or an asset: digits, mnist-10k, mnist, fashion-mnist, orl-faces",
    ),
]
Crop = Annotated[
    str,
    typer.Option(
        metavar="center|pad|none|N",
        help="center: cut the middle; pad: keep all; none: reject images that are not square; N: cut N pixels",
    ),
]
Levels = Annotated[
    int | None, typer.Option(min=255, max=65535, help="largest value of 16-bit pictures, such as 4095 for 12 bits")
]
HoldOut = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="images that training must not see, say 0.1; empty: those of an asset"),
]
LabelsFrom = Annotated[
    str | None,
    typer.Option(metavar="folder|FILE", help="labels for judges: folder names, idx, dataset.json, CelebA's or CSV"),
]


@data_app.command()
def pack(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="DST", help="a folder or s3://bucket/prefix")],
    resolution: Annotated[int, typer.Option(help="side of the packed square images in pixels")],
    channels: Annotated[int, typer.Option(help="3 (RGB) or 1 (grey)")] = 3,
    crop: Crop = "center",
    image_format: Annotated[Format | None, typer.Option("--format", help="empty: png up to 64 px, jpeg above")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="quality of jpeg and webp")] = 95,
    shard_size: Annotated[float, typer.Option(min=0.001, help="megabytes per shard")] = 256.0,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="encoding threads")] = 2,
    name: Annotated[str | None, typer.Option(help="prefix of the shards; empty: the last part of DST")] = None,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="leave out unreadable images; each is logged")
    ] = False,
    levels: Levels = None,
    holdout: HoldOut = None,
    labels: LabelsFrom = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="take files of such names whatever the rules say")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="leave out files of such names, say 'masks/*'")
    ] = None,
    endpoint: Endpoint = None,
    unsigned: Unsigned = False,
) -> None:
    """Pack images into webdataset shards with an index. The same command resumes after an interruption.

    \b
    glann data pack mnist-10k data/mnist-10k --resolution 28 --channels 1
    glann data pack ~/CelebA-HQ s3://bucket/celebahq-1024 --resolution 1024 --workers 16 --holdout 0.1
    glann data pack img_align_celeba data/celeba-64 --resolution 64 --crop 160 --labels list_attr_celeba.txt
    """
    from ..datasets import pack as packing
    from ..datasets.fit import not_trainable

    if words := not_trainable(resolution):
        typer.echo(f"note: {words}", err=True)
    with _progress("packing") as progress:
        index = packing.pack(
            source,
            destination,
            resolution=resolution,
            channels=channels,
            crop=crop,
            image_format=image_format.value if image_format else None,
            quality=quality,
            shard_size_mb=shard_size,
            workers=workers,
            name=name,
            skip_corrupt=skip_corrupt,
            levels=levels,
            holdout=holdout,
            labels=labels,
            include=include or (),
            exclude=exclude or (),
            s3=s3_at(endpoint, unsigned),
            progress=progress,
        )
    typer.echo(packing.summary(index, destination))


@data_app.command()
def info(
    url: Annotated[str, typer.Argument(metavar="URL")], endpoint: Endpoint = None, unsigned: Unsigned = False
) -> None:
    """Describe a packed data set."""
    from ..datasets.verify import describe

    for key, value in describe(url, s3_at(endpoint, unsigned)).items():
        typer.echo(f"{key:14} {value}")


@data_app.command()
def verify(
    url: Annotated[str, typer.Argument(metavar="URL")], endpoint: Endpoint = None, unsigned: Unsigned = False
) -> None:
    """Check every shard against the index; the exit status is 1 if anything is damaged."""
    from ..datasets.verify import verify as run

    with _progress("verifying") as progress:
        faults = run(url, s3_at(endpoint, unsigned), progress=progress)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(ExitStatus.ENVIRONMENT)
    typer.echo(f"{url} is intact")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; call it with images done and images in all."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
