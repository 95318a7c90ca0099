"""Population-based training: a run continues from a copy of another one, with other learning rates."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..cluster.checkpoints import retention
from ..cluster.checkpoints.best import BEST
from ..cluster.checkpoints.layout import folder_name
from ..config.run import Config
from ..errors import UserError
from ..reports.run_folder import MODEL, read_config, write_config
from ..storage.base import Store
from ..storage.open import open_store


def newest_step(config: Config) -> int | None:
    """Step of the newest checkpoint of a run; None if it has none."""
    return retention.latest(open_store(config.checkpoint_url, config.s3))


def clone_run(donor: Path, config: Config, chosen: int | None) -> None:
    """Replace the state of the run of `config` by a checkpoint of the donor.

    Args:
        chosen: step of the donor's checkpoint when it was selected. If it was removed since, the newest is taken.
    Raises:
        UserError: the donor has no checkpoint.
    """
    source = open_store(read_config(donor).checkpoint_url, config.s3)
    target = open_store(config.checkpoint_url, config.s3)
    kept, _ = retention.usable(source)
    step = chosen if chosen in kept else max(kept, default=None)
    if step is None:
        raise UserError(f"{donor} has no checkpoint to continue from yet; use a longer search.interval")
    for key in target.list():
        if key.startswith("step-") or key == BEST:
            target.delete(key)
    copy_step(source, target, step)
    shutil.rmtree(config.run_dir / MODEL, ignore_errors=True)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config.run_dir, config)


def copy_step(source: Store, target: Store, step: int) -> None:
    """Copy a checkpoint, its manifest last: without one an interrupted copy does not count as a checkpoint."""
    manifest = f"{folder_name(step)}/manifest.json"
    keys = [key for key in source.list(f"{folder_name(step)}/") if key != manifest]
    for key in (*keys, manifest):
        target.write(key, source.read(key))
