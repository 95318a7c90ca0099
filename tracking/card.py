"""MODEL_CARD.md: what a trained model is, how good it is and what it is not for."""

from __future__ import annotations

from pathlib import Path

from .. import __version__
from .connection import redact
from .facts import RunFacts
from .lineage import CARD as FILE
from .lineage import STUDY, TRIAL
from .outbox import State
from .page import environment, write_page
from .report import commands, headline, metric_rows


def write_card(run_dir: Path) -> Path:
    """Write the model card of a run folder.

    Raises:
        UserError: the folder is not a run, or one of its files is damaged.
    """
    facts = RunFacts.read(run_dir)
    state = State.load(run_dir)
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
            commands=commands(facts),
            run_id=state and state.run_id,
            study=state and state.lineage.get(STUDY),
            trial=state and state.lineage.get(TRIAL),
            samples="images/samples.png" if facts.picture("samples") else None,
        )
    )
    return write_page(run_dir / FILE, text)
