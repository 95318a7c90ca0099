"""MODEL_CARD.md: data, quality and limits of a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..config.samplers import SamplerConfig
from ..config.section import Trait
from ..errors import redact
from ..storage.files import write_whole
from .assets import used_assets
from .copying import warning
from .facts import RunFacts
from .figures import metric_rows
from .limits import verdict
from .page import as_webp, environment, readable, write_page
from .run import commands, headline
from .run_folder import CARD, CARD_PICTURE, IMAGES

PICTURE_WIDTH = 640  # pixels; pages of MLflow show a picture as large as it is


@dataclass(frozen=True)
class TrackedAs:
    """The MLflow run of a run folder, and its study and trial; None where there is none."""

    run_id: str | None = None
    study: str | None = None
    trial: str | None = None


def describe_sampler(sampler: SamplerConfig) -> str:
    """The kind of a sampler and its keys in the registry: `imle (noise_dim 32, hidden_dim 128, ...)`."""
    fields = type(sampler).model_fields.items()
    keys = [f"{name} {getattr(sampler, name)}" for name, field in fields if Trait.IN_REGISTRY in field.metadata]
    return sampler.kind + (f" ({', '.join(keys)})" if keys else "")


def _picture(facts: RunFacts) -> str | None:
    """Write the picture of the card; returns its path below the run folder, None of a run without samples."""
    samples = facts.picture("samples")
    if samples is None:
        return None
    path = facts.run_dir / IMAGES / CARD_PICTURE
    with readable(samples) as image:
        write_whole(path, as_webp(image, PICTURE_WIDTH)[0])
    return path.relative_to(facts.run_dir).as_posix()


def write_card(run_dir: Path, tracked: TrackedAs = TrackedAs()) -> Path:
    """Write the model card of a run folder.

    Raises:
        UserError: the folder is not a run, or one of its files is damaged.
    """
    facts = RunFacts.read(run_dir)
    text = (
        environment()
        .get_template("card.md")
        .render(
            facts=facts,
            config=facts.config,
            data_url=redact(facts.config.data.url),
            version=__version__,
            headline=headline(facts),
            metrics=metric_rows(facts.metrics),
            verdict=verdict(facts.metrics),
            copying=warning(facts.metrics),
            commands=commands(facts),
            tracked=tracked,
            assets=used_assets(facts),
            sampler=describe_sampler(facts.config.sampler),
            picture=_picture(facts),
        )
    )
    return write_page(run_dir / CARD, text)
