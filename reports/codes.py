"""The latent codes in a report: how far they have moved from their random start, and how they are organised."""

from __future__ import annotations

from .facts import RunFacts, StageFacts, series
from .page import number


def code_rows(facts: RunFacts) -> list[tuple[str, str, str]]:
    """Rows (label, formatted value, meaning) of the last measures of the codes; none for runs without them."""
    last: dict[str, float] = {}
    for stage in facts.stages:
        last |= _last(stage)
    rows = []
    if "code_angle" in last:
        meaning = "mean angle of a code to its random start; 90° would be no trace of it"
        rows.append(("moved", f"{last['code_angle']:.0f}°", meaning))
    if "code_dimension" in last:
        size = facts.config.generator.latent_dim
        meaning = "of the spread of the codes: (Σλ)² / Σλ² of the eigenvalues of their covariance"
        rows.append(("effective dimension", f"{last['code_dimension']:.3g} of {size}", meaning))
    if "code_agreement" in last:
        chance = f"{last['code_agreement_by_chance']:.1%} by chance" if "code_agreement_by_chance" in last else ""
        meaning = "share of codes whose nearest code is that of one of their ten nearest images (16 px)"
        rows.append(
            ("nearest-neighbour agreement", f"{last['code_agreement']:.1%}", f"{meaning}; {chance}".strip("; "))
        )
    if rows and "latent_lr" in last:
        rows.append(("learning rate", number(last["latent_lr"]), "of the codes, at the beginning of the run"))
    return rows


def _last(stage: StageFacts) -> dict[str, float]:
    """The last value of each measure; of the rate, the largest, since schedules lower it."""
    keys = ("code_angle", "code_dimension", "code_agreement", "code_agreement_by_chance", "latent_lr")
    found = {key: values for key in keys if (values := series(stage.entries, key)[1])}
    return {key: max(values) if key == "latent_lr" else values[-1] for key, values in found.items()}
