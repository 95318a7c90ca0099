"""Final part of a run, in the driver: package the model, and write and track results, pictures and the report."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...cluster.checkpoints import retention
from ...cluster.jobs.revision import code_revision
from ...config.run import Config
from ...datasets.fit import require_fit
from ...datasets.index import Index
from ...errors import EnvironmentFault, redact
from ...metrics.result import Result, by_key, deviations
from ...reports.card import write_card
from ...reports.copying import warning
from ...reports.figures import main_rows, reference_of
from ...reports.limits import verdict
from ...reports.run import write_report
from ...reports.run_folder import IMAGES, MODEL, REPORT, write_summary
from ...reports.sheets import Sheet
from ...storage.open import open_store
from ...tracking.address import default_uri
from ...tracking.runs import TrackedRun
from ..stage import DONE, stage_infos
from . import shared
from .evaluation import EVALUATION, Evaluated
from .folder import require_summary
from .packaging import export_saved
from .state import load

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text


def finish(config: Config, index: Index, tracked: TrackedRun, timings: dict[str, float], evaluated: Evaluated) -> None:
    """Write and track the remaining files of a finished run folder; the report comes last. No image is decoded here.

    Args:
        timings: seconds and rates of the training, over all starts of the run, by name.
    """
    rows = require_fit(index, config.data, 1)
    last = package(config, index, rows, evaluated)
    timings = timings | {"train_s": timings["train_s"] - evaluated.seconds, "finish_s": evaluated.seconds}
    drawn, results, hardware = evaluated.drawn, evaluated.results, evaluated.hardware
    conclude(config, tracked, drawn, results, timings, index, rows, hardware, last, evaluated.step, evaluated.code_map)


def conclude(
    config: Config,
    tracked: TrackedRun,
    drawn: dict[str, Sheet],
    results: list[Result],
    timings: dict[str, float],
    index: Index,
    rows: int,
    hardware: str,
    step: int,
    checkpoint: int | None = None,
    code_map: dict[str, Any] | None = None,
) -> None:
    """Write and track pictures (by name), results, card and report of a packaged model.

    Args:
        hardware: the devices that trained or measured it. step: the last one of the run, over all stages.
        checkpoint: the step that the model was made of, if it was made of a checkpoint.
        code_map: as in `reports.code_map`.
    """
    folder = config.run_dir / IMAGES
    folder.mkdir(exist_ok=True)
    for name, sheet in drawn.items():
        sheet.save(folder / f"{name}.png")
        tracked.log_image(folder / f"{name}.png", f"final {name}", step)
    metrics = by_key(results)
    tracked.log_metrics({"stage": EVALUATION} | metrics, step)
    summary: dict[str, Any] = {"metrics": metrics, "deviations": deviations(results), "timings": timings}
    summary |= {"rows": rows, "fingerprint": index.fingerprint, "asset": index.asset or ""}
    summary |= {"use": config.checkpoint.use, "checkpoint": checkpoint}
    summary |= {} if code_map is None else {"code_map": code_map}
    made = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "host": socket.gethostname()}
    made |= {
        "hardware": hardware,
        "version": __version__,
        "commit": code_revision() or "",
        "mlflow": tracked.link or "",
    }
    summary["made"] = made
    (config.run_dir / REPORT).unlink(missing_ok=True)
    write_summary(config.run_dir, summary)
    card = write_card(config.run_dir, tracked.tracked_as)
    tracked.log_artifact(card)
    tracked.describe(card)
    tracked.log_model(config.run_dir / MODEL)
    tracked.log_artifact(write_report(config.run_dir))  # last: a run with a report is finished


def package(config: Config, index: Index, rows: int, evaluated: Evaluated) -> int:
    """Write `model/` from the checkpoint that was measured; returns the last step of the run."""
    store = open_store(config.checkpoint_url, config.s3)
    last = retention.latest(store)
    saved = load(store, evaluated.step, index, rows) if last is not None else None
    if saved is None or last is None or (evaluated.step == last and saved.position.stage != DONE):
        raise EnvironmentFault(f"{store.url} holds no finished checkpoint; run the same command again to resume it")
    export_saved(config.run_dir / MODEL, config, saved, evaluated.gaussian, rows, index.fingerprint)
    return last


def summary_of(config: Config) -> Group:
    """Summary of a finished run: training, metrics, files and suggested commands; print it with `soft_wrap`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = require_summary(config)
    metrics, timings = summary["metrics"], summary["timings"]
    cluster = config.cluster
    workers = "-".join(str(count) for count in sorted({cluster.min_workers, cluster.max_workers}))
    workers += " worker" if cluster.max_workers == 1 else " workers"
    epochs = " + ".join(str(info.epochs) for info in stage_infos(config).values())
    trained = (
        f"{summary['rows']:,} images of {config.data.resolution} px, {config.generator.kind}, "
        f"d={config.generator.latent_dim}; {epochs} epochs, {workers}, "
        f"{timings['train_s'] / 60:.1f} min"
    )
    if (starts := timings.get("starts", 1)) > 1:
        trained += f" in {starts:.0f} starts"
    table = Table(show_header=False, box=None, pad_edge=False)
    for title, value, bounds, _ in main_rows(metrics, summary.get("deviations", {})):
        table.add_row(f"  {title}", value, *filter(None, [bounds]))
    others = "images that training has not seen" if reference_of(metrics) else "the training images"
    against = Text(f"  samples are compared with {others}; the report has all figures")
    look, try_next = in_job(config, summary) if shared.is_job() else here(config, summary)
    parts: list[Table | Text] = [Text(f"{config.name}: done", style="bold"), Text(f"  {trained}"), table, against]
    parts += [Text(f"  {words}") for words in (verdict(metrics), warning(metrics)) if words]
    for title, lines in (("look at", look), ("try next", try_next)):  # unwrapped, so that they can be copied
        parts += [Text(title, style="bold"), *(Text(f"  {line}") for line in lines)]
    return Group(*parts)


def here(config: Config, summary: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Where to look at a finished run on this machine, and commands to try next."""
    run = config.run_dir
    look = [f"{run}/{REPORT}", f"{run}/{IMAGES}/samples.png"]
    try_next = [
        shlex.join([program("glann"), "sample", str(run), "--n", "100", "--seed", "1", "--out", "more.png"]),
        shlex.join([program("glann"), "interpolate", str(run), "--out", "between.png"]),
    ]
    if page := page_of(config, summary):
        look.append(page)
    elif config.tracking.enabled:
        store = redact(default_uri(config.tracking.uri))
        try_next.append(shlex.join([program("mlflow"), "ui", "--backend-store-uri", store]))
    return look, try_next


def in_job(config: Config, summary: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The same for the user of a job, whose machine is another one."""
    return shared.addresses(config, page_of(config, summary)), shared.commands(config)


def page_of(config: Config, summary: dict[str, Any]) -> str:
    """The page of a run, or else of the server, in MLflow; empty where it is not tracked, or in a file."""
    store = redact(default_uri(config.tracking.uri))
    if not config.tracking.enabled or not store.startswith(("http://", "https://")):
        return ""
    return summary.get("made", {}).get("mlflow") or store


def program(name: str) -> str:
    """Command for a program of this environment: its name if it is on the path, else its path."""
    if shutil.which(name):
        return name
    beside = Path(sys.executable).with_name(name)
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
