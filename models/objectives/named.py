"""Objectives by the name in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from ...config.networks import ObjectiveConfig
from .base import Objective
from .divergences import DIVERGENCES, divergence
from .energy import began, energy
from .hinge import hinge
from .least_squares import least_squares
from .loss_sensitive import loss_sensitive
from .minimax import minimax, non_saturating
from .relativistic import relativistic
from .wasserstein import wasserstein

# One entry per name; `config.networks.OBJECTIVES` lists the same ones, with the keys that each reads.
BUILDERS: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "minimax": lambda config: minimax(config.smooth),
    "non-saturating": lambda config: non_saturating(config.smooth),
    "least-squares": lambda config: least_squares(*config.targets),
    "wasserstein": lambda config: wasserstein(),
    "hinge": lambda config: hinge(),
    "energy": lambda config: energy(config.margin),
    "began": lambda config: began(config.gamma, config.rate),
    "loss-sensitive": lambda config: loss_sensitive(config.weight),
    "relativistic": lambda config: relativistic(),
    **{name: lambda config, name=name: divergence(name) for name in DIVERGENCES},  # type: ignore[misc]
}


def objective_of(config: ObjectiveConfig) -> Objective:
    """Build the configured objective."""
    return BUILDERS[config.kind](config)
