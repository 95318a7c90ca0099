"""`glann evaluate` and `glann report`: what a finished run is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError, redact
from .options import Checkpoint, Device, Seed
from .progress import counted

if TYPE_CHECKING:
    from ..config.run import Config
    from ..inference.model import SamplingModel
    from ..inference.package import ModelManifest

PAIRS = 16  # of a sample and its nearest training image, in a picture


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/digits, or models:/name@alias")],
    extractor: Annotated[
        str | None,
        typer.Option(help="squeezenet, lite0, lite0-96, vgg16 or inception; empty: as configured in the run"),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="a group of more metrics: kid, prd, coverage, modes, copying, codes, is, perceptual, or all"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="images to draw; empty: as configured in the run")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="URL", help="packed images to compare with; empty: the training images")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(metavar="PNG", help="picture of the samples that are most like a training image")
    ] = None,
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:
    """Evaluate a finished run: reconstruction error, Frechet distance, precision and recall of a named extractor.

    \b
    glann evaluate runs/digits --extractor lite0-96 --samples 5000 --metrics kid --metrics codes
    glann evaluate runs/digits --data data/other-28 --pairs pairs.png
    glann evaluate models:/digits@champion --data data/mnist-10k

    `gaussian/...` is the same metric for codes drawn from a Gaussian, without stage 2; `reconstruction/...` for
    reconstructions. `...:held-out` is against held-out images: those of the data set or of `evaluation.data`, or with
    --data others than the training images. Copying is measured where there are any.
    """
    from ..config.run import validate
    from ..metrics.evaluate import evaluate as measure
    from ..metrics.result import by_key
    from ..metrics.spec import METRICS
    from ..reports.run_folder import read_summary
    from ..tracking.source import is_registered, open_model, run_config
    from ..trainers.run.packaging import open_checkpoint

    config = run_config(run)
    tree = config.model_dump(mode="json")
    given = {"extractor": extractor, "samples": samples, "metrics": metrics or None}
    tree["evaluation"] |= {key: value for key, value in given.items() if value is not None}
    config = config.model_copy(update={"evaluation": validate(tree, "the options given").evaluation})
    if checkpoint is None:
        manifest, model = open_model(run, s3=config.s3, device=device)
        step = None if is_registered(run) else (read_summary(run) or {}).get("checkpoint")
    else:
        opened = open_checkpoint(run, checkpoint, s3=config.s3, device=device)
        manifest, model, step = opened.manifest, opened.model, opened.step
    with counted("evaluating", "images") as on_images:
        results = measure(
            config,
            manifest,
            model,
            seed=seed,
            data=data,
            with_codes=not is_registered(run),
            step=step,
            on_images=on_images,
        )
    if config.has_codes and all(METRICS[result.metric].of_samples for result in results):
        typer.echo("reconstruction is not measured: it needs a run folder with its codes, and their images", err=True)
    elif any(result.reference for result in results) and not any(METRICS[r.metric].held_out for r in results):
        typer.echo("copying is not measured: the training images are not at their address any more", err=True)
    for name, value in by_key(results).items():
        typer.echo(f"{name:32} {value:.6g}")
    if pairs is not None:
        _save_pairs(pairs, config, manifest, model, seed)


def _save_pairs(path: Path, config: Config, manifest: ModelManifest, model: SamplingModel, seed: int) -> None:
    """Save a picture of the samples that are most like a training image, beside these."""
    from ..metrics.evaluate import closest_pairs
    from ..metrics.reference import training_set
    from ..reports import pictures

    images = training_set(config, manifest)
    if images is None:
        raise UserError(f"the training images are not at {redact(config.data.url)} any more; --pairs needs them")
    samples_NHWC, training_NHWC = closest_pairs(config, model, images, PAIRS, seed)
    rows = pictures.beside_nearest(list(samples_NHWC), list(training_NHWC))
    pictures.save(pictures.labelled_rows(rows, whole=True), path)
    typer.echo(f"{path}: the {PAIRS} samples most like a training image, nearest first")


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="folder of a run, study or comparison, such as runs/digits")
    ],
) -> None:
    """Write report.html of a run, study or comparison, finished or not: one self-contained file.

    \b
    glann report runs/digits
    glann report studies/digits-study
    """
    from ..reports.run import write_report as write_run
    from ..tuning.compare.folder import is_comparison, saved_comparison
    from ..tuning.compare.report import write_report as write_comparison
    from ..tuning.folder import is_study, saved_study
    from ..tuning.report.study import write_report as write_study

    if is_comparison(folder):
        typer.echo(write_comparison(saved_comparison(folder)))
    else:
        typer.echo(write_study(saved_study(folder)) if is_study(folder) else write_run(folder))
