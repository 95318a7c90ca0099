"""Selection of usable checkpoints, and removal of old and incomplete ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ...errors import UserError
from ...storage.base import Store
from .best import BEST, named_best
from .layout import FOLDER, MANIFEST, DamagedCheckpoint, committed_steps, folder_name, survey

log = logging.getLogger(__name__)


def latest(store: Store) -> int | None:
    """Step of the newest complete checkpoint, or None; logs a warning for each damaged one."""
    found = survey(store)
    for step, reason in found.damaged.items():
        log.warning("skipping damaged checkpoint %s: %s", folder_name(step), reason)
    return max(found.good, default=None)


def usable(store: Store) -> tuple[list[int], dict[int, str]]:
    """Steps of the checkpoints to resume from, newest first, and the faults of the damaged ones.

    Raises:
        UserError: there are checkpoints and all are damaged; the run must not start over on top of them.
    """
    found = survey(store)
    if found.damaged and not found.good:
        newest = max(found.damaged)
        raise none_left(store, {newest: found.damaged[newest]})
    return sorted(found.good, reverse=True), found.damaged


def none_left(store: Store, damaged: Mapping[int, str]) -> UserError:
    """The error for a run whose checkpoints are all damaged."""
    return UserError(
        f"no checkpoint of {store.url} can be used: {'; '.join(damaged.values())}; restore it, or remove this folder "
        "to start the run over"
    )


def remove_torn(store: Store) -> list[str]:
    """Remove the remains of killed saves: folders without a manifest, and files that no manifest lists.

    Only while nothing is being saved: in the driver before it starts the workers, and in the workers when they start.

    Returns:
        Names of the removed folders.
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
    """Remove checkpoints except the newest `keep` complete ones and the one that best.json names.

    A damaged one never counts; it is removed once there are `keep` newer complete ones, but for the best, which stays
    until another one takes its place. The manifest is removed first,
    so that an interrupted removal leaves no checkpoint rather than half of one. While best.json is damaged nothing is
    removed: one of them may be the best.

    Returns:
        The removed steps.
    """
    try:
        best = named_best(store)
    except DamagedCheckpoint as error:
        log.warning("no checkpoint is removed while it is unknown which one is the best: %s; remove %s", error, BEST)
        return []
    found = survey(store)
    good = found.good
    kept = list(good)[-max(1, keep) :]
    enough = len(kept) == max(1, keep)
    removed = [step for step in good if step not in kept]
    removed += [step for step in found.damaged if enough and step < kept[0]]
    removed = [step for step in removed if best is None or step != best.step]
    for step in sorted(removed):
        folder = folder_name(step)
        for key in [f"{folder}/{MANIFEST}", *store.list(f"{folder}/")]:
            store.delete(key)
    return sorted(removed)
