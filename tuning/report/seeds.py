"""The comparison that trains the best of a study, and the recipe, again with several seeds.

The best of many trials is partly chance. `seeds.yaml` beside the report is an input of `glann compare`: what it finds
has no part in the search, so its means are not chosen.
"""

from __future__ import annotations

import re

from ...config.run import find_recipe
from ...trainers.run.shared import is_job
from ..compare.comparison import OWN, SHARED, Comparison
from ..ledger import Trial
from ..study import StudyConfig

SEEDS_FILE = "seeds.yaml"
SEEDS = 5


def seeds_comparison(study: StudyConfig, best: Trial) -> Comparison | None:
    """The comparison; None if the study shares a stage 1, has no recipe file here, or searched the data.

    All methods of a comparison have the same data, so trials with other data are none of its methods.
    """
    shared = [key for key in best.params if key.split(".")[0] in SHARED]
    if not isinstance(study.recipe, str) or shared:
        return None
    measured = study.base().evaluation.model_dump(mode="json")
    tree = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", study.name)[:34] + "-seeds",
        "studies_dir": study.studies_dir,
        "recipe": study.recipe if study.is_bundled else str(find_recipe(study.recipe).absolute()),
        "overrides": {key: value for key, value in study.overrides.items() if key.split(".")[0] not in OWN},
        "methods": {"recipe": {}, "best": best.params},
        "seeds": list(range(1, SEEDS + 1)),
        "evaluation": measured,
        "ratio": ["best", "recipe"],
    }
    return Comparison.model_validate(tree)


def seeds_yaml(study: StudyConfig, best: Trial) -> str:
    """The text of `seeds.yaml`; empty where there is none."""
    comparison = None if is_job() else seeds_comparison(study, best)
    if comparison is None:
        return ""
    seeds = f"{SEEDS} seeds that the search has not seen"
    head = f"# {study.name}: trial {best.number} and the recipe, each with {seeds}.\n"
    return head + comparison.to_yaml()
