"""The `glann` command. Each subcommand imports its dependencies when it runs, so that `--help` is fast.

Exit statuses: `errors.ExitStatus`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..errors import ExitStatus, GlannError, UserError, one_line, redact
from .data import Endpoint, data_app, s3_at
from .drain import drain, leave
from .jobs import jobs_app, submit
from .registry import registry_app
from .tune import tune

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from numpy import uint8
    from numpy.typing import NDArray
    from rich.console import Console

    from ..config.run import Config

app = typer.Typer(
    name="glann",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(jobs_app, name="jobs")
app.add_typer(registry_app, name="registry")

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe's name or a YAML file; see `glann recipes`")]
MaybeRecipeArg = Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="a recipe's name or a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. glo.epochs=100; see `glann config --keys`")
]
SourceArg = Annotated[
    str, typer.Argument(metavar="SOURCE", help="a run folder, models:/name@alias, or an s3:// address of a model")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="the same seed draws the same images")]
Truncation = Annotated[
    float, typer.Option(min=0.0, max=10.0, help="factor of the noise; below 1: higher quality, less variety")
]
Device = Annotated[str, typer.Option(help="device: cpu, cuda, cuda:1")]


SamplerName = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        "--method",
        metavar="KIND",
        help="sampler of the codes; empty means the model's own, gaussian is the baseline. --method is the old name",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"glann {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="print the traceback of an error (anywhere on the line)")
    ] = False,
) -> None:
    """Train GLANN on a cluster: non-adversarial image generation with one latent code per image.

    \b
    glann train digits                          5,000 digits, two workers, no GPU
    glann train celebahq-1024 --dry-run         the estimated cost, without training
    glann sample runs/digits --out samples.png  new images from a finished run
    glann doctor celebahq-1024                  check that this cluster is ready for it
    glann submit celebahq-1024 ...              train on a remote cluster
    glann tune digits                           search for better values of a recipe
    """


@app.command()
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
    glann train configs/celebahq-256.yaml glo.epochs=100 cluster.workers=8
    glann train celebahq-1024 data.url=s3://bucket/celebahq-1024 checkpoint.url=s3://bucket/runs --dry-run
    """
    resolved = _load(config, overrides)
    if dry_run:
        from ..trainers.plan.estimate import make_plan

        _console().print(make_plan(resolved))
        return
    from ..trainers.run.driver import train as run

    console = _console()
    console.print(run(resolved, console), soft_wrap=True)


app.command()(submit)
app.command()(tune)


@app.command()
def sample(
    source: SourceArg,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="number of images")] = 64,
    seed: Seed = 0,
    truncation: Truncation = 1.0,
    sampler: SamplerName = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="x.png: one grid; x.npz: `images` uint8 [n,H,W,C]; else a folder of PNGs"),
    ] = Path("samples.png"),
    device: Device = "cpu",
    endpoint: Endpoint = None,
) -> None:
    """Draw new images from a trained model.

    \b
    glann sample runs/digits --n 100 --seed 1 --out grid.png
    glann sample models:/faces@best --n 10000 --out faces.npz --device cuda
    glann sample s3://bucket/runs/celebahq-1024/model --n 16 --truncation 0.8 --out folder
    """
    from ..tracking.source import load_model

    _check_out(out)
    model = load_model(source, s3=s3_at(endpoint), device=device)
    _save_images(model.stream(n, seed, truncation, sampler), out)
    typer.echo(f"{n} images of {model.resolution} px: {out}")


@app.command()
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
) -> None:
    """Draw interpolations between pairs of images, one row per pair.

    \b
    glann interpolate runs/faces-64 --pairs 6 --steps 10 --out faces.png
    """
    from ..tracking.source import load_model

    _check_out(out)
    model = load_model(source, s3=s3_at(endpoint), device=device)
    ends = [(2 * pair, 2 * pair + 1) for pair in range(pairs)]
    images_PSHWC = model.interpolate(ends, steps, seed, truncation, sampler)
    _save_images(iter(images_PSHWC), out, columns=steps)
    typer.echo(f"{pairs} interpolations of {steps} images: {out}")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/digits, or models:/name@alias")],
    extractor: Annotated[
        str | None, typer.Option(help="squeezenet, lite0, vgg16 or inception; empty: as configured in the run")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="images to draw; empty: as configured in the run")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="URL", help="packed images to compare with; empty: the training images")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Evaluate a finished run: reconstruction error, and Frechet distance with a named extractor.

    \b
    glann evaluate runs/digits --extractor lite0 --samples 5000
    glann evaluate models:/digits@champion --data data/digits-28

    `gaussian/...` is the same metric for codes drawn from a Gaussian, without stage 2.
    """
    from ..config.run import validate
    from ..metrics.evaluate import evaluate as measure
    from ..metrics.result import by_key
    from ..metrics.spec import METRICS
    from ..tracking.source import is_registered, open_model, run_config

    config = run_config(run)
    tree = config.model_dump(mode="json")
    given = {"extractor": extractor, "samples": samples}
    tree["evaluation"] |= {key: value for key, value in given.items() if value is not None}
    config = config.model_copy(update={"evaluation": validate(tree, "the options given").evaluation})
    manifest, model = open_model(run, s3=config.s3, device=device)
    results = measure(config, manifest, model, seed=seed, device=device, data=data, with_codes=not is_registered(run))
    if all(METRICS[result.metric].of_samples for result in results):
        typer.echo("reconstruction is not measured: it needs a run folder with its codes, and their images", err=True)
    for name, value in by_key(results, model.own).items():
        typer.echo(f"{name:32} {value:.6g}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a run or a study, such as runs/digits")],
) -> None:
    """Write report.html of a run or a study, finished or not: one self-contained file.

    \b
    glann report runs/digits
    glann report studies/digits-study
    """
    from ..reports.run import write_report as write_run
    from ..tuning.folder import is_study, saved_study
    from ..tuning.report.study import write_report as write_study

    typer.echo(write_study(saved_study(folder)) if is_study(folder) else write_run(folder))


@app.command("config")
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


@app.command()
def recipes() -> None:
    """List the recipes that ship with glann."""
    from ..config.run import RECIPES, load

    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = load(path)
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        where = f"{recipe.cluster.max_workers} x " + ("GPU" if recipe.cluster.gpus_per_worker else "CPU")
        typer.echo(f"{path.stem:15} {recipe.data.resolution:5} px  {where:8} {first}")


@app.command()
def doctor(config: MaybeRecipeArg = None, overrides: Overrides = None) -> None:
    """Check versions, accelerators, Ray, MLflow, storage, data and disks; one line per check.

    \b
    glann doctor
    glann doctor celebahq-1024 data.url=s3://bucket/celebahq-1024 cluster.address=auto

    The exit status is 1 if a check fails.
    """
    from ..cluster.doctor.checks import checks

    bad = 0
    for check in checks(_load(config, overrides) if config else None):
        bad += not check.ok
        remedy = f"\n      {'':14} do: {check.remedy}" if check.remedy and not check.ok else ""
        typer.echo(f"{'good' if check.ok else 'BAD '}  {check.name:14} {check.found}{remedy}")
    if bad:
        typer.echo(f"{bad} of the checks {'is' if bad == 1 else 'are'} bad", err=True)
        raise typer.Exit(ExitStatus.ENVIRONMENT)


app.command()(drain)
app.command(hidden=True)(leave)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit; errors are printed to stderr in one line."""
    given = sys.argv[1:] if arguments is None else arguments
    show = "--traceback" in given  # at any position: it is often added to the end of a failed command
    given = [argument for argument in given if argument != "--traceback"]
    try:
        app(args=given, prog_name="glann")
    except SystemExit as exit:
        if exit.code == ExitStatus.INTERRUPTED:
            _print_error("interrupted" + ("; the same command resumes the run" if given[:1] == ["train"] else ""))
        raise
    except Exception as error:
        if show:
            sys.excepthook = _traceback  # Python's own traceback, without passwords
            raise
        message, status = explain(error)
        _print_error(message)
        sys.exit(status)
    sys.exit(ExitStatus.OK)


def explain(error: Exception) -> tuple[str, int]:
    """The error line to print, and the exit status."""
    if isinstance(error, GlannError):
        return f"{'stopped' if error.exit_status == ExitStatus.STOPPED else 'error'}: {error}", error.exit_status
    if isinstance(error, OSError) and error.strerror:
        return f"error: {error.strerror}" + (f": {error.filename}" if error.filename else ""), ExitStatus.ENVIRONMENT
    what = f"unexpected {type(error).__name__}: {one_line(error, 300)}"
    return f"error: {what}; this is a bug: run the command again with --traceback and report it", ExitStatus.BUG


def _traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    import traceback

    _print_error(redact("".join(traceback.format_exception(kind, error, at))))


def _print_error(line: str) -> None:
    print(line, file=sys.stderr)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _load(config: str, overrides: list[str] | None) -> Config:
    from ..config.run import load

    return load(config, overrides or [])


def _check_out(out: Path) -> None:
    """Reject an output path that images cannot be saved to, before anything is computed."""
    if out.suffix.lower() not in ("", ".png", ".npz"):
        raise UserError(f"--out {out}: use x.png for one grid, x.npz for an array, or a folder without a suffix")
    if out.suffix == "" and out.is_file():
        raise UserError(f"--out {out} is a file; name a folder, x.png or x.npz")
    if out.suffix and out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")


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
