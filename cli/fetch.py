"""`glann jobs fetch`: the results of a submitted run, or study, from shared storage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EnvironmentFault, UserError
from .options import HERE, AddressOption, Endpoint, s3_at
from .progress import counted

if TYPE_CHECKING:
    from ..trainers.run.shared import Fetched

MEGABYTE = 1_000_000


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of the run or study")],
    dest: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="folder; empty means runs/NAME, or studies/NAME")
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option("--runs", metavar="URL", help="its checkpoint.url; empty: the cluster is asked, at --address"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files in DEST that differ")] = False,
    address: AddressOption = HERE,
    endpoint: Endpoint = None,
) -> None:
    """Copy the results of a run to this machine: report, card, pictures, journal and model, from shared storage.

    \b
    glann jobs fetch celebahq-1024
    glann jobs fetch celebahq-1024 --runs s3://bucket/runs         also when the cluster is gone
    glann jobs fetch digits-study                                  a study, with the run of its best trial

    The storage is read with this machine's keys. What is in DEST already is not copied again, so the same command
    completes an interrupted copy; files that differ are only replaced with --overwrite. DEST is a run folder like any
    other: `glann sample runs/NAME`, `glann registry register runs/NAME`.
    """
    from ..reports.run_folder import STUDY
    from ..storage.open import open_store

    if origin is None:
        name, origin = _place_of(name, address)
    s3, url = s3_at(endpoint), f"{origin.rstrip('/')}/{name}"
    is_study = (store := open_store(url, s3)).exists(STUDY)
    folder = dest or Path("studies" if is_study else "runs") / name
    fetched = _copy(store, folder, overwrite)
    typer.echo(f"{_told(fetched)}; {url} -> {folder}")
    if is_study:
        _fetch_best(folder, origin, endpoint, overwrite)
    if not fetched.finished:
        typer.echo(f"{name} has not finished; this is what there is so far", err=True)


def _place_of(name: str, address: str) -> tuple[str, str]:
    """The name of a run and its checkpoint.url, by the cluster's list of jobs."""
    from ..cluster.jobs import client as jobs

    try:
        client = jobs.connect(address)
        with jobs.one_line_errors(address):
            job = jobs.find(client, name)
    except (EnvironmentFault, UserError) as error:
        raise type(error)(f"{error}; without the cluster: --runs URL, the checkpoint.url of the run") from error
    return job.name, job.checkpoints.rpartition("/")[0].rpartition("/")[0]


def _fetch_best(folder: Path, origin: str, endpoint: str | None, overwrite: bool) -> None:
    """The run folder of the best trial, which lies beside that of the study."""
    from ..storage.open import open_store
    from ..tuning.folder import best_run

    try:
        best = best_run(folder)
    except UserError as error:
        typer.echo(f"no trial is copied: {error}", err=True)
        return
    if not best.is_relative_to(folder.absolute()):  # a run that was there before the study
        typer.echo(f"the best is the run that the study started from, {best}", err=True)
        return
    fetched = _copy(open_store(f"{origin.rstrip('/')}/{best.name}", s3_at(endpoint)), best, overwrite)
    typer.echo(f"{_told(fetched)} of its best trial -> {best}")


def _copy(store: object, folder: Path, overwrite: bool) -> Fetched:
    from ..trainers.run import shared

    with counted("copying", "bytes") as show:
        return shared.fetch(store, folder, overwrite, show=show)  # type: ignore[arg-type]


def _told(fetched: Fetched) -> str:
    there = f", {fetched.kept} were there" if fetched.kept else ""
    return f"copied {fetched.copied} files ({fetched.size / MEGABYTE:.1f} MB){there}"
