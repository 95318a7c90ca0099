"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..config.sections import S3Config

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe's name or a YAML file; see `glann recipes`")]
MaybeRecipeArg = Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="a recipe's name or a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. glo.epochs=100; see `glann config --keys`")
]
SourceArg = Annotated[
    str, typer.Argument(metavar="SOURCE", help="a run folder, models:/name@alias, or an s3:// address of a model")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        metavar="WHICH",
        help="take a checkpoint of the run, which may still train: best (by evaluation.best), last, or a step; empty: "
        "the packaged model",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="the same seed draws the same images")]
Truncation = Annotated[
    float, typer.Option(min=0.0, max=10.0, help="factor of the noise; below 1: higher quality, less variety")
]
Device = Annotated[str, typer.Option(help="device: cpu, cuda, cuda:1; auto is a GPU, where there is one")]
SamplerName = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        "--method",
        metavar="KIND",
        help="sampler of the codes; empty means the model's own, gaussian is the baseline. --method is the old name",
    ),
]
AddressOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", show_envvar=True, help="the cluster's dashboard, e.g. http://HEAD:8265"
    ),
]
HERE = "http://127.0.0.1:8265"
Endpoint = Annotated[
    str | None, typer.Option("--endpoint-url", help="S3 endpoint; empty means AWS_ENDPOINT_URL, then AWS")
]
Unsigned = Annotated[bool, typer.Option("--no-sign-request", help="send no keys, to read public buckets of S3")]


def s3_at(endpoint: str | None, unsigned: bool = False) -> S3Config:
    """The default S3 configuration, with another endpoint if one is given; `unsigned` sends no keys."""
    from pydantic import ValidationError

    from ..config.parse import reason, shown
    from ..config.sections import S3Config
    from ..errors import UserError

    try:
        return S3Config(endpoint_url=endpoint, anonymous=unsigned)
    except ValidationError as error:
        why = reason(error.errors(include_url=False)[0])
        raise UserError(f"--endpoint-url {shown(endpoint)} is not possible: {why}") from error
