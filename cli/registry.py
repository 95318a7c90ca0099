"""`glann registry`: trained models by name and version, and the champion of each name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device
from .progress import counted
from .table import print_table

if TYPE_CHECKING:
    from ..tracking.registry.catalogue import ModelEntry, Version

registry_app = typer.Typer(no_args_is_help=True, help="Register trained models, compare versions, choose the champion.")

NameArg = Annotated[str, typer.Argument(metavar="NAME", help="name of the registered model")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="reason; recorded with user and time")]
METRICS_SHOWN = 3


@registry_app.command("list")
def list_models() -> None:
    """List the registered models; tab-separated if not on a terminal.

    \b
    glann registry list

    The registry is the one at MLFLOW_TRACKING_URI, or in mlflow.db in this folder.
    """
    from ..tracking.registry import catalogue
    from ..tracking.registry.client import CHALLENGER, CHAMPION, opened

    with opened("no model is registered") as client:
        entries = [catalogue.read(client, name) for name in catalogue.names(client)]
    rows = [
        (
            entry.name,
            str(len(entry.versions)),
            str(entry.aliases.get(CHAMPION, "-")),
            str(entry.aliases.get(CHALLENGER, "-")),
            _metrics(entry.champion or entry.versions[0]) if entry.versions else "-",
        )
        for entry in entries
    ]
    print_table(("NAME", "VERSIONS", "CHAMPION", "CHALLENGER", "METRICS"), rows, "no model is registered yet")


@registry_app.command()
def show(name: NameArg) -> None:
    """Show the versions of a model, the newest first, and the history of its champion.

    \b
    glann registry show digits
    """
    from ..tracking.registry import catalogue
    from ..tracking.registry.client import opened
    from ..tracking.registry.history import history

    with opened(f"no model {name}") as client:
        entry = catalogue.read(client, name)
    rows = [_row(entry, version) for version in entry.versions]
    print_table(("VERSION", "ALIASES", "REGISTERED", "DATA", "METRICS", "RUN", "FROM"), rows, f"{name} has no versions")
    for event in history(entry):
        instead = f" instead of {event.previous}" if event.previous else ""
        forced, why = " (forced)" if event.forced else "", f": {event.why}" if event.why else ""
        typer.echo(f"{event.at}  {event.action} {event.version}{instead}{forced} by {event.by}{why}")


@registry_app.command()
def register(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="a run folder, a study folder (its best trial), or an MLflow run id"),
    ],
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="name of the model; empty means the name of the run")
    ] = None,
) -> None:
    """Register a finished run as the newest version of a model, its challenger.

    \b
    glann registry register runs/digits
    glann registry register studies/digits-study --as digits                     its best trial
    glann registry register studies/digits-study/trials/digits-study-0007 --as digits

    `tracking.register_as=NAME` does the same at the end of `glann train`. A run that is not in MLflow
    (tracking.enabled=false) is sent there first. Registering a run twice creates one version.
    """
    from ..tracking.registry.registration import register_run
    from ..tuning.folder import best_run, is_study

    if is_study(run):
        run = str(best_run(run))
    made = register_run(run, name)
    if made.fresh:
        typer.echo(f"{run} is version {made.version} of {made.name}, its challenger")
    else:
        typer.echo(f"{run} is version {made.version} of {made.name} already; nothing was changed")


@registry_app.command()
def promote(
    name: NameArg,
    version: Annotated[
        int | None, typer.Option(min=1, metavar="V", help="version to promote; empty means the challenger")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="promote also if it is worse, or of another data set or resolution")
    ] = False,
    why: Why = "",
    data: Annotated[
        str | None, typer.Option(metavar="URL", help="packed images to compare with; empty: the training images")
    ] = None,
    extractor: Annotated[
        str | None, typer.Option(help="squeezenet, lite0, vgg16 or inception; empty: as configured in the run")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="images to draw; empty: as configured in the run")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of the images that both draw")] = 0,
    device: Device = "auto",
) -> None:
    """Promote the challenger to champion if it is not worse.

    \b
    glann registry promote digits --why "twice the epochs"
    glann registry promote faces --version 3 --extractor lite0 --samples 10000
    glann registry promote faces --data s3://bucket/faces-held-out

    Both are evaluated: Frechet distance of the same number of samples of the same seed to the same images. A worse
    challenger is rejected with status 2 and nothing changes. Afterwards models:/NAME@champion is the new version.
    """
    from ..tracking.registry.promote import Conditions
    from ..tracking.registry.promote import promote as run

    with counted("evaluating", "images") as on_images:
        conditions = Conditions(data, extractor, samples, seed, device, on_images)
        run(name, version, conditions, why=why, force=force, say=typer.echo)


@registry_app.command()
def rollback(name: NameArg, why: Why = "") -> None:
    """Restore the previous champion; repeat it to go back further.

    \b
    glann registry rollback digits --why "blurred sevens"
    """
    from ..tracking.registry.client import opened
    from ..tracking.registry.history import rollback as run

    with opened(f"no model {name}") as client:
        event = run(client, name, why)
    typer.echo(f"version {event.version} of {name} is the champion again, instead of {event.previous}")


def _row(entry: ModelEntry, version: Version) -> tuple[str, ...]:
    from datetime import datetime

    tags = version.tags
    source = tags.get("glann.study", "-")
    if "glann.trial" in tags:
        source += f", trial {tags['glann.trial']}"
    return (
        str(version.number),
        " ".join(entry.aliases_of(version.number)) or "-",
        datetime.fromtimestamp(version.created).strftime("%Y-%m-%d %H:%M"),
        version.fingerprint[:12] or "-",
        _metrics(version),
        tags.get("glann.run_name", "-"),
        source,
    )


def _metrics(version: Version) -> str:
    """The first few metrics, without the baseline's."""
    from ..metrics.result import names_sampler

    shown = [(name, value) for name, value in sorted(version.metrics.items()) if not names_sampler(name)]
    return ", ".join(f"{name} {float(value):.4g}" for name, value in shown[:METRICS_SHOWN]) or "-"
