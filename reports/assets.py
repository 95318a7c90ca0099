"""Weights and images of others that a run used, with their authors and licences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from ..datasets.assets.catalogue import ASSETS, LICENCES, weights_of
from ..metrics.features.extractor import EXTRACTORS
from .facts import RunFacts


@dataclass(frozen=True)
class UsedAsset:
    """One row of the table: what it was used for, whose it is, and its licence.

    page, licence_url: addresses; empty of files that are not in the catalogue, whose licence is unknown.
    """

    use: str
    credit: str
    licence: str
    page: str = ""
    licence_url: str = ""


def used_assets(facts: RunFacts) -> list[UsedAsset]:
    """The assets of a run: weights of the loss, extractor of the metrics once there are some, and named images."""
    config, images = facts.config, str(facts.summary.get("asset", ""))
    named = {"frozen network of the loss": weights_of(config.loss)}
    if facts.metrics:
        named["feature extractor of the metrics"] = EXTRACTORS[config.evaluation.extractor].weights
    if images in ASSETS:
        named["training images"] = images
        if config.evaluation.data is None:
            named["held-out images"] = ASSETS[images].held_out
    return [_used(use, name) for use, name in named.items() if name]


def _used(use: str, name: str) -> UsedAsset:
    if name not in ASSETS:
        return UsedAsset(use, f"the file {PurePath(name).name}", "not known to glann: ask its publisher")
    asset = ASSETS[name]
    # some licences ask that changes be stated
    how = "; converted to safetensors, values unchanged" if asset.kind == "weights" else ""
    return UsedAsset(use, asset.credit + how, asset.licence, asset.page, LICENCES[asset.licence])
