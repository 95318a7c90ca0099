"""report.html of a run: one page that loads nothing from the network; only full-size images may lie beside it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from .. import __version__
from ..config.run import redacted_config
from .assets import used_assets
from .charts import line_chart
from .code_map import code_chart
from .codes import code_rows
from .copying import warning
from .facts import RunFacts, series
from .figures import figure_rows, main_rows, reference_of
from .gallery import Wanted, gallery
from .limits import verdict
from .page import duration, environment, number, write_page
from .run_folder import REPORT

MAX_PREVIEWS = 12
FRAME_WIDTH = 704  # pixels of a preview, twice as many as it takes on the page

PICTURES = {
    "samples": ("Samples", "New images: one noise vector each."),
    "interpolations": (
        "Interpolations",
        "Each row leads from one sample to another along a great circle of the noise.",
    ),
    "nearest": ("Nearest training images", "Below each sample: the training image that is nearest in pixels."),
}


def write_report(run_dir: Path) -> Path:
    """Write report.html of a run folder, whether or not the run has finished.

    Raises:
        UserError: the folder is not a run, or one of its files is damaged.
    """
    return write_page(run_dir / REPORT, render(RunFacts.read(run_dir)))


def render(facts: RunFacts) -> str:
    """The page as HTML."""
    sections = [
        ([Wanted(path, title, name)], name, title, text)
        for name, (title, text) in PICTURES.items()
        if (path := facts.picture(name))
    ]
    films = _films(facts)
    drawn = gallery(facts.run_dir, [wanted for group, *_ in (*sections, *films) for wanted in group])
    shown = iter(drawn.shown)
    return (
        environment()
        .get_template("report.html")
        .render(
            facts=facts,
            config=facts.config,
            version=__version__,
            headline=headline(facts),
            codes=code_rows(facts),
            figures=main_rows(facts.metrics, facts.deviations),
            reference=reference_of(facts.metrics),
            all_figures=figure_rows(facts.metrics, facts.deviations),
            verdict=verdict(facts.metrics),
            copying=warning(facts.metrics),
            charts=_charts(facts),
            code_map=code_chart(facts.summary),
            pictures=[(*words, next(shown)) for _, *words in sections],
            films=[(*words, [next(shown) for _ in group]) for group, *words in films],
            drawn=drawn,
            timings=timing_rows(facts.timings),
            assets=used_assets(facts),
            settings=redacted_config(facts.config).to_yaml(),
            commands=commands(facts),
        )
    )


def headline(facts: RunFacts) -> str:
    """One sentence on what was trained."""
    config = facts.config
    kind = "grey" if config.data.channels == 1 else "colour"
    rows = facts.summary.get("rows")
    images = f"{rows:,} {kind} images" if isinstance(rows, int) else f"{kind} images"
    done = " and ".join(f"{stage.title} for {_epochs(stage.epochs)}" for stage in facts.stages)
    state = "" if facts.finished else " The run has not finished."
    return (
        f"{images} of {config.data.resolution} × {config.data.resolution} px, "
        f"{config.generator.kind} generator with {config.generator.latent_dim}-dimensional codes; "
        f"{done or 'nothing trained yet'}.{state}"
    )


def timing_rows(timings: Mapping[str, object]) -> list[tuple[str, str]]:
    """Rows (label, formatted value) of the summary's timings; keys that end in _s or seconds are durations."""
    rows = []
    for name, value in timings.items():
        if not isinstance(value, int | float):
            continue
        seconds = name.endswith(("_s", "seconds")) and not name.endswith("per_s")
        words = name.removesuffix("_s").removesuffix("_seconds") if seconds else name
        rows.append((words.replace("_per_s", "/s").replace("_", " "), duration(value) if seconds else number(value)))
    return rows


def commands(facts: RunFacts) -> list[str]:
    """Commands that sample from the model and evaluate it."""
    run = shlex.quote(facts.run_dir.as_posix())
    return [
        f"glann sample {run} --n 64 --seed 1",
        f"glann interpolate {run}",
        f"glann evaluate {run}",
    ]


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"


def _charts(facts: RunFacts) -> list[Markup]:
    charts = []
    for stage in facts.stages:
        for key, title, label, log in (
            ("loss", f"{stage.title}: loss", "loss", True),
            ("images_per_s", f"{stage.title}: throughput", "images/s", False),
            ("code_angle", f"{stage.title}: angle of the codes to their start", "degrees", False),
            ("critic_gap", f"{stage.title}: gap of the critic's scores", "D(real) - D(generated)", False),
            ("content", f"{stage.title}: content loss, of reconstructions", "loss", True),
        ):
            steps, values = series(stage.entries, key)
            if len(values) >= 2:
                charts.append(line_chart(steps, values, title=title, label=label, log=log))
    return charts


def _films(facts: RunFacts) -> list[tuple[list[Wanted], str, str, str]]:
    """Previews of each stage and kind over time, with id, title and text: at most `MAX_PREVIEWS` of each, including
    the first and the last."""
    texts = {
        "reconstructions": "Rows x: training images. Rows G(z): their reconstructions from the codes.",
        "samples": "The same noise at every epoch.",
    }
    films = []
    for stage in facts.stages:
        for kind, text in texts.items():
            shown = [preview for preview in facts.previews if (preview.stage, preview.kind) == (stage.name, kind)]
            if len(shown) > MAX_PREVIEWS:
                shown = [shown[round(i * (len(shown) - 1) / (MAX_PREVIEWS - 1))] for i in range(MAX_PREVIEWS)]
            if shown:
                id, title = f"{stage.name}-{kind}", f"{stage.title}: {kind} while training"
                frames = [Wanted(one.path, f"{title}, epoch {one.epoch}", id, FRAME_WIDTH) for one in shown]
                films.append((frames, id, title, text))
    return films
