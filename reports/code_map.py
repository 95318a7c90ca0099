"""A map of codes: those of training images and those that the sampler draws, on two axes.

Where both kinds do not cover one another, the sampler misses a part of the codes, or draws some that no image has.

Shapes: N codes, D latent dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from torch import Tensor

from .charts import INK, LINE, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 500  # codes of each kind, about
KINDS, LABELS = ("images", "drawn"), ("training images", "new images")
DIGITS = 4  # after the decimal point of a coordinate


def every(rows: int) -> int:
    """The distance of the rows whose codes are shown."""
    return max(1, rows // SHOWN)


def taken(z_BD: Tensor, first: int, rows: int) -> Tensor:
    """The codes that are shown of a block that begins with row `first`, out of `rows`."""
    return z_BD[-first % every(rows) :: every(rows)]


def code_map(images_ND: Tensor, drawn_ND: Tensor) -> dict[str, Any]:
    """Both kinds of codes on the two first principal axes of those of images; `explained` is these axes' share."""
    from sklearn.decomposition import PCA  # a second to import

    axes = PCA(n_components=2, svd_solver="full").fit(images_ND.double().numpy())
    both = (axes.transform(z_ND.double().numpy()).round(DIGITS).tolist() for z_ND in (images_ND, drawn_ND))
    return {
        "explained": [round(float(share), DIGITS) for share in axes.explained_variance_ratio_],
        **dict(zip(KINDS, both, strict=True)),
    }


def code_chart(summary: dict[str, Any]) -> tuple[Markup, str] | None:
    """The map of a run, and what it shows in words; None without one that can be drawn."""
    held = summary.get("code_map")
    if not isinstance(held, dict):
        return None
    kinds = [list(pairs(held.get(kind))) for kind in KINDS]
    shares = held.get("explained")
    if not all(kinds) or not isinstance(shares, list) or not all(isinstance(share, float) for share in shares):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for points, label, colour, marker in zip(kinds, LABELS, (INK, LINE), "o+", strict=True):
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=14, c=colour, marker=marker, alpha=0.5, linewidths=0.8, label=label)
        axes.set_title("Codes on their first two principal axes", loc="left", fontsize=12)
        axes.legend(frameon=False)
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[["top", "right"]].set_visible(False)

    text = (
        "Codes of training images, and codes that the sampler draws for new ones. The axes are the first two principal "
        f"ones of the former and hold {sum(shares):.0%} of their spread."
    )
    return drawing("Codes on their first two principal axes", (6.4, 5.0), draw), text


def pairs(held: object) -> Iterator[tuple[float, float]]:
    """The pairs of finite numbers in what a file holds."""
    for point in held if isinstance(held, list) else ():
        if isinstance(point, list) and len(point) == 2:
            x, y = point
            if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(x) and math.isfinite(y):
                yield float(x), float(y)
