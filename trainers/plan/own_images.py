"""The recipe `own-images`: what it leaves to the images, and to the machine, is read from them.

What decides the numbers follows from the images alone, so that another machine resumes the same run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...config.run import Config, load
from ...config.shorthands import canonical
from ...datasets.index import Index
from ...errors import UserError

RECIPE = "own-images"
VISITS = 250_000  # of images in stage 1, within the bounds below
FEWEST_EPOCHS, MOST_EPOCHS = 25, 300


def load_recipe(
    recipe: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    changes: Mapping[str, Any] = MappingProxyType({}),
    *,
    here: bool = True,
) -> Config:
    """Load a recipe as `config.run.load` does; `own-images` is fitted to its images and to this machine.

    Args:
        here: whether the run is to be on this machine.
    Raises:
        UserError: one line per error; also if there are no images at `data.url`.
    """
    config = load(recipe, overrides, changes)
    if str(recipe) != RECIPE:
        return config
    if not here:
        raise UserError(
            f"{RECIPE} is fitted to the machine that it runs on; write it down with `glann config {RECIPE} "
            "data.url=... > mine.yaml`, set cluster.workers and cluster.gpus_per_worker there, and submit mine.yaml"
        )
    given = {canonical(text.partition("=")[0].strip()) for text in overrides} | {canonical(key) for key in changes}
    index = Index.load(config.data.url, config.s3)
    rows = min(index.rows, config.data.max_rows or index.rows)
    fitted = for_images(index.resolution, index.channels, rows)
    fitted |= for_machine(min(fitted["glo.batch_size"], rows))
    left = {key: value for key, value in fitted.items() if key not in given}
    return load(recipe, overrides, {**changes, **left})


def for_images(resolution: int, channels: int, rows: int) -> dict[str, Any]:
    """Keys by the size and number of images."""
    small = resolution <= 64
    return {
        "data.resolution": resolution,
        "data.channels": channels,
        "generator.kind": "infogan" if small else "resnet",
        "generator.latent_dim": 64 if small else 128,
        "loss.magnify": 1.5 if resolution <= 32 else 1,
        "glo.epochs": max(FEWEST_EPOCHS, min(MOST_EPOCHS, VISITS // rows)),
        "glo.batch_size": min(128 if small else 64, max(2, rows // 16)),
        "glo.generator_lr": 0.003 if small else 0.001,
        "evaluation.extractor": "lite0-96" if small else "lite0",
    }


def for_machine(most: int) -> dict[str, Any]:
    """Keys by the devices of this machine, all of which may change when a run is resumed; at most `most` workers."""
    import torch  # takes a second, which other recipes need not wait for

    gpus = min(most, torch.cuda.device_count()) if torch.cuda.is_available() else 0
    if gpus > 1:
        spread = {"engine.kind": "deepspeed", "engine.zero": 1, "cluster.workers": gpus}
    else:
        spread = {"engine.kind": "torch", "engine.zero": 0, "cluster.workers": 1}
    cores = os.cpu_count() or 1
    return spread | {"cluster.gpus_per_worker": min(gpus, 1), "cluster.cpus_per_worker": max(1, cores // max(gpus, 1))}
