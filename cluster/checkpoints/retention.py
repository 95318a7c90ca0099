"""Which checkpoints there are, which of them can be used, and which are removed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ...errors import UserError
from ...storage.base import Store
from .layout import FOLDER, MANIFEST, committed_steps, folder_name, survey

log = logging.getLogger(__name__)


def latest(store: Store) -> int | None:
    """The step of the newest complete checkpoint, or None. A damaged one is passed over with a warning."""
    found = survey(store)
    for step, reason in found.damaged.items():
        log.warning("checkpoint %s is passed over: %s", folder_name(step), reason)
    return max(found.good, default=None)


def usable(store: Store) -> tuple[list[int], dict[int, str]]:
    """The steps to go on from, newest first, and why the damaged ones are passed over.

    Raises:
        UserError: there are checkpoints, and none can be used. A run never begins anew over them.
    """
    found = survey(store)
    if found.damaged and not found.good:
        newest = max(found.damaged)
        raise none_left(store, {newest: found.damaged[newest]})
    return sorted(found.good, reverse=True), found.damaged


def none_left(store: Store, damaged: Mapping[int, str]) -> UserError:
    """The error for a run whose checkpoints are all damaged."""
    told = "; ".join(damaged.values())
    return UserError(
        f"no checkpoint of {store.url} can be used: {told}; restore it, or remove this folder to begin the run anew"
    )


def remove_torn(store: Store) -> list[str]:
    """Remove what killed saves left behind: folders without a manifest, whose names are returned, and stray files.

    Only for when nobody saves: by the driver before it starts the workers, and by the workers when they start.
    """
    store.sweep("step-")
    sizes = store.sizes("step-")
    steps = committed_steps(sizes)
    torn = sorted({key.partition("/")[0] for key in sizes if FOLDER.match(key)} - {folder_name(step) for step in steps})
    listed = {folder_name(step): manifest for step, manifest in survey(store).good.items()}
    for key in sizes:
        folder, _, rest = key.partition("/")
        manifest = listed.get(folder)
        stray = manifest and rest != MANIFEST and rest.removeprefix(f"{manifest.attempt}/") not in manifest.files
        if folder in torn or stray:
            store.delete(key)
    return torn


def retain(store: Store, keep: int) -> list[int]:
    """Remove checkpoints except the newest `keep` that look whole and the best by score. Returns the steps removed.

    A damaged one goes once `keep` newer ones look whole; it is never counted as one of them. The manifest
    goes first, so that a removal cut short leaves no checkpoint rather than half of one.
    """
    found = survey(store)
    good = found.good
    scores = {step: manifest.score for step, manifest in good.items() if manifest.score is not None}
    best = min(scores, key=lambda step: (scores[step], -step), default=None)
    kept = list(good)[-max(1, keep) :]
    whole_enough = len(kept) == max(1, keep)
    removed = [step for step in good if step not in kept and step != best]
    removed += [step for step in found.damaged if whole_enough and step < kept[0]]
    for step in sorted(removed):
        folder = folder_name(step)
        for key in [f"{folder}/{MANIFEST}", *store.list(f"{folder}/")]:
            store.delete(key)
    return sorted(removed)
