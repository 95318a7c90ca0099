"""Check of a packed data set against the configuration."""

from __future__ import annotations

from typing import get_args

from ..config.sections import DataConfig
from ..errors import UserError
from .index import Index

TRAINABLE: tuple[int, ...] = get_args(DataConfig.model_fields["resolution"].annotation)


def not_trainable(resolution: int) -> str:
    """Words on a resolution that no recipe can have; empty for others."""
    if resolution in TRAINABLE:
        return ""
    return f"images of {resolution} px cannot be trained on; {', '.join(map(str, TRAINABLE))} px can"


def require_fit(index: Index, data: DataConfig, workers: int) -> int:
    """Check that a data set fits the configuration, and return the number of rows to train on.

    Raises:
        UserError: other resolution or channels than configured, or fewer images than workers.
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
    if rows < workers:
        raise UserError(f"{rows} images are fewer than cluster.workers={workers}; use fewer workers")
    return rows
