"""The images that a run is measured against: opening them, reading them, and whether they fit.

Shapes: B batch, C, H, W channels, height, width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from ..cluster.placement import ranges
from ..config.run import Config
from ..datasets.fit import held_out_of, require_fit
from ..datasets.index import Index
from ..datasets.loader import BadRows, PlannedBatch, batches
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..inference.package import ModelManifest
from .copying import CELLS, IN_A_CELL
from .spec import ALL

BATCH, BATCH_BYTES = 100, 64 << 20  # images of a batch that is read, and their bytes, at most


def training_images(images: ImageRows, rows: range, config: Config) -> Iterator[Tensor]:
    """The images of consecutive rows, uint8 [B, C, H, W]."""
    size = config.data.channels * config.data.resolution**2
    at_once = max(1, min(BATCH, BATCH_BYTES // size))
    parts: Sequence[range] = ranges(len(rows), -(-len(rows) // at_once)) if rows else []
    plan = [
        PlannedBatch(step, rows.start + np.arange(part.start, part.stop), np.ones(len(part), np.float32))
        for step, part in enumerate(parts)
    ]
    bad = BadRows(config.data.max_bad_fraction, len(images))
    for batch in batches(images, plan, threads=config.data.threads, prefetch=config.data.prefetch, max_bad=bad):
        yield batch.img_BCHW


def open_images(config: Config) -> ImageRows:
    """Open the data set of a run."""
    data = config.data
    return ImageRows(data.url, config.s3, cache_dir=data.cache_dir, cache_gb=data.cache_gb, max_rows=data.max_rows)


def held_out_images(config: Config, index: Index) -> ImageRows | None:
    """Open the images that training does not see (`fit.held_out_of`); None if there are none.

    Args:
        index: of the training images.
    Raises:
        UserError: they are not there, do not fit the training images, or are too few for the configured metrics.
    """
    found = held_out_of(config, index)
    if found is None:
        return None
    (url, held_out), groups = found, config.evaluation.metrics
    if ("copying" in groups or ALL in groups) and held_out.rows < CELLS * IN_A_CELL:
        raise UserError(
            f"evaluation.metrics={','.join(groups)} has a test of copying, which needs {CELLS * IN_A_CELL} held-out "
            f"images, and {url} holds {held_out.rows}; hold out more, or leave the test out"
        )
    data = config.data
    return ImageRows(url, config.s3, cache_dir=data.cache_dir, cache_gb=data.cache_gb)


def training_set(config: Config, manifest: ModelManifest) -> ImageRows | None:
    """The training images at the address of the configuration; None if they are not there any more."""
    try:
        images = open_images(moved(config, None))
    except UserError:
        return None
    return images if images.index.fingerprint == manifest.fingerprint else None


def moved(config: Config, url: str | None) -> Config:
    """Replace the address of the data, if another is given.

    Raises:
        UserError: none is given, and the password of the configured address was removed.
    """
    if url is None and "***@" in config.data.url:
        raise UserError(
            f"the password of {config.data.url} was not kept; give the address of the images with --data URL"
        )
    return config if url is None else config.model_copy(update={"data": config.data.model_copy(update={"url": url})})


def require_same(images: ImageRows, manifest: ModelManifest, config: Config, given: str | None) -> None:
    """Check that images have the model's resolution and channels and, without a given address, its fingerprint.

    Raises:
        UserError: they do not.
    """
    require_fit(images.index, config.data, 1)
    if given is None and images.index.fingerprint != manifest.fingerprint:
        raise UserError(
            f"{config.data.url} holds other images than {manifest.name} was trained on; give them with --data URL"
        )
