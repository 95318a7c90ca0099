"""Check of a packed data set against the configuration."""

from __future__ import annotations

from typing import get_args

from ..config.run import Config
from ..config.sections import DataConfig
from ..errors import UserError
from ..storage.open import open_store
from .index import Index, held_out_url

MIN_ROWS = 2  # with one image there is no covariance, so a run could be trained and never be measured
TRAINABLE: tuple[int, ...] = get_args(DataConfig.model_fields["resolution"].annotation)


def not_trainable(resolution: int) -> str:
    """Words on a resolution that no recipe can have; empty for others."""
    if resolution in TRAINABLE:
        return ""
    return f"images of {resolution} px cannot be trained on; {', '.join(map(str, TRAINABLE))} px can"


def require_fit(index: Index, data: DataConfig, workers: int) -> int:
    """Check that a data set fits the configuration, and return the number of rows to train on.

    Raises:
        UserError: other resolution or channels than configured, fewer than two images, or fewer than workers.
    """
    for key, wanted, found in (
        ("resolution", data.resolution, index.resolution),
        ("channels", data.channels, index.channels),
    ):
        if wanted != found:
            why = not_trainable(found) if key == "resolution" else ""
            change = f"{why}: pack" if why else f"set data.{key}={found}, or pack"
            raise UserError(
                f"data.{key} is {wanted} but {data.url} holds images of {found}; {change} it "
                f"again with `glann data pack ... --resolution {data.resolution} --channels {data.channels}`"
            )
    rows = min(index.rows, data.max_rows or index.rows)
    if rows < MIN_ROWS:
        limit = index.rows >= MIN_ROWS
        given = f"data.max_rows={data.max_rows} leaves" if limit else f"{data.url} holds"
        remedy = f"set data.max_rows={MIN_ROWS} or more" if limit else "pack more images with `glann data pack`"
        raise UserError(f"{given} {rows} image; at least {MIN_ROWS} are needed to measure a Fréchet distance; {remedy}")
    if rows < workers:
        raise UserError(
            f"{data.url} gives {rows} images, fewer than cluster.workers={workers}; set cluster.workers={rows} or less"
        )
    return rows


def held_out_of(config: Config, index: Index) -> tuple[str, Index] | None:
    """The address and the index of the images that training does not see; None if there are none.

    They are at `evaluation.data`, or else the held-out part of the data set.

    Args:
        index: of the training images.
    Raises:
        UserError: they are not there, are other than the training images in size or channels, the same, or too few.
    """
    url = config.evaluation.data
    if url is None:
        if index.held_out is None:
            return None
        url = held_out_url(config.data.url)
        return url, index.load_held_out(open_store(url, config.s3))
    if "***@" in url:
        raise UserError(f"the password of evaluation.data={url} was not kept; give its address again")
    found = Index.load(url, config.s3)
    for what, wanted, has in (
        ("resolution", index.resolution, found.resolution),
        ("channels", index.channels, found.channels),
    ):
        if wanted != has:
            raise UserError(
                f"evaluation.data={url} has {what} {has} and {config.data.url} has {wanted}; pack it again with "
                f"`glann data pack ... --resolution {index.resolution} --channels {index.channels}`"
            )
    if found.fingerprint == index.fingerprint:
        raise UserError(f"evaluation.data={url} holds the training images themselves; name images that are held out")
    if found.rows < MIN_ROWS:
        raise UserError(f"evaluation.data={url} holds {found.rows} image; at least {MIN_ROWS} are needed; pack more")
    return url, found
