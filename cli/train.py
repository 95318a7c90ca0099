"""`glann train`, and what comes before it: `glann config`, `glann recipes`, `glann doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ExitStatus, UserError, redact
from .options import MaybeRecipeArg, Overrides, RecipeArg

if TYPE_CHECKING:
    from ..config.run import Config


def train(
    config: RecipeArg,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan (cost, memory, time) without training")
    ] = False,
) -> None:
    """Train both stages, or resume an interrupted run: the same command does both.

    \b
    glann train digits
    glann train own-images data.url=data/mine
    glann train configs/celebahq-256.yaml glo.epochs=100 cluster.workers=8
    glann train celebahq-1024 data.url=s3://bucket/celebahq-1024 checkpoint.url=s3://bucket/runs --dry-run
    """
    from rich.console import Console

    resolved = _load(config, overrides)
    if dry_run:
        from ..trainers.plan.estimate import make_plan

        Console().print(make_plan(resolved))
        return
    from ..trainers.run.driver import train as run

    console = Console()
    console.print(run(resolved, console), soft_wrap=True)


def show_config(
    config: MaybeRecipeArg = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of every key")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="list every key with its default and meaning")] = False,
) -> None:
    """Print the resolved configuration of a recipe, or the reference of all keys.

    \b
    glann config digits glo.epochs=10       the resolved YAML
    glann config --keys                     every key, its default and meaning
    glann config --schema > glann.json      for editors
    """
    import json

    from ..config.reference import describe_keys
    from ..config.run import Config

    if schema + keys + (config is not None) != 1:
        raise UserError("give one of: RECIPE, --keys or --schema; see `glann config --help`")
    if schema:
        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
    elif keys:
        for key in describe_keys():
            typer.echo(f"{key.name}\n    {key.kind}, {key.default}\n    {key.meaning}")
    else:
        typer.echo(redact(_load(config or "", overrides).to_yaml()), nl=False)


def recipes() -> None:
    """List the recipes that ship with glann."""
    from ..config.run import bundled_recipes, load

    for path in bundled_recipes():
        recipe = load(path)
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        where = f"{recipe.cluster.max_workers} x " + ("GPU" if recipe.cluster.gpus_per_worker else "CPU")
        typer.echo(f"{path.stem:15} {recipe.data.resolution:5} px  {where:8} {first}")


def doctor(config: MaybeRecipeArg = None, overrides: Overrides = None) -> None:
    """Check versions, accelerators, Ray, MLflow, storage, data and disks; one line per check.

    \b
    glann doctor
    glann doctor celebahq-1024 data.url=s3://bucket/celebahq-1024 cluster.address=auto

    The exit status is 1 if a check fails.
    """
    from itertools import chain

    from ..cluster.doctor.checks import checks
    from ..tracking.doctor import tracking

    resolved = _load(config, overrides) if config else None
    bad = 0
    for check in chain(checks(resolved), tracking(resolved) if resolved else ()):
        bad += not check.ok
        remedy = f"\n      {'':14} do: {check.remedy}" if check.remedy and not check.ok else ""
        typer.echo(f"{'good' if check.ok else 'BAD '}  {check.name:14} {check.found}{remedy}")
    if bad:
        typer.echo(f"{bad} of the checks {'is' if bad == 1 else 'are'} bad", err=True)
        raise typer.Exit(ExitStatus.ENVIRONMENT)


def _load(config: str, overrides: list[str] | None) -> Config:
    from ..trainers.plan.own_images import load_recipe

    return load_recipe(config, overrides or [])
