"""The training images nearest to samples, by their pixels.

Legend: N samples, R images of a block, P pixels of a reduced image.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..datasets.reader import CorruptImage, ImageRows
from ..errors import UserError
from .team import ALONE, Team

# Larger images are averaged down to this side: copies stay recognisable, and a million rows affordable.
COMPARED_SIDE = 64
DEFAULT_LIMIT = 50_000
CHUNK = 64  # images decoded at once; 200 MB of 1024 px


@dataclass(frozen=True)
class NearestImages:
    """`rows_N` of the data set, their images, and the root mean square difference of pixels (range 0..1)."""

    rows_N: NDArray[np.int64]
    img_NHWC: NDArray[np.uint8]
    distance_N: NDArray[np.float64]
    searched: int


def nearest_images(
    sample_NHWC: NDArray[np.uint8],
    images: ImageRows,
    *,
    threads: int = 2,
    limit: int = DEFAULT_LIMIT,
    team: Team = ALONE,
) -> NearestImages | None:
    """Search the training images (evenly spaced ones if there are more than `limit`) by pixel distance. Collective.

    Exact among the searched images; ties go to the lowest row.  Corrupt images are skipped. Each worker of the team
    searches a part for the same samples, and rank 0 gets the result, the others None.
    """
    sample_NP = _pixels(torch.from_numpy(sample_NHWC).permute(0, 3, 1, 2))
    best_N = torch.full((len(sample_NP),), torch.inf, dtype=torch.float64)
    row_N = torch.full((len(sample_NP),), -1, dtype=torch.int64)
    searched_R = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(np.int64))
    own = team.part(len(searched_R))
    with ThreadPoolExecutor(threads) as pool:
        rows = iter(searched_R[own.start : own.stop].tolist())
        while chunk := list(islice(rows, CHUNK)):
            team.on_images(len(chunk))
            decoded = [
                (row, img) for row, img in zip(chunk, pool.map(_decoder(images), chunk), strict=True) if img is not None
            ]
            if not decoded:
                continue
            small_RP = torch.cat([_pixels(torch.from_numpy(img)[None]) for _, img in decoded])
            distance_NR = torch.cdist(sample_NP, small_RP, compute_mode="donot_use_mm_for_euclid_dist").double()
            nearest = distance_NR.min(1)
            rows_R = torch.tensor([row for row, _ in decoded])
            best_N, row_N = _closer(best_N, row_N, nearest.values, rows_R[nearest.indices])
    best_N, row_N = reduce(lambda one, other: _closer(*one, *other), team.shared((best_N, row_N)))  # by rank, so by row
    if bool((row_N < 0).any()):
        raise UserError("no training image could be read to compare the samples with; run `glann data verify`")
    mine = set(searched_R[own.start : own.stop].tolist())  # every image is read where it was searched
    found = team.collected({row: images.decode(row) for row in set(row_N.tolist()) & mine})
    if not found:
        return None
    by_row = reduce(lambda one, other: one | other, found)
    found_N = np.stack([by_row[row] for row in row_N.tolist()])
    rms_N = best_N.numpy() / np.sqrt(sample_NP.shape[1])
    return NearestImages(row_N.numpy(), found_N.transpose(0, 2, 3, 1), rms_N, len(searched_R))


def _closer(best_N: Tensor, row_N: Tensor, other_N: Tensor, other_row_N: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller distances with their rows; of equal ones the first."""
    closer_N = other_N < best_N
    return torch.where(closer_N, other_N, best_N), torch.where(closer_N, other_row_N, row_N)


def _pixels(img_BCHW: Tensor) -> Tensor:
    side = min(COMPARED_SIDE, *img_BCHW.shape[2:])
    return adaptive_avg_pool2d(img_BCHW.float() / 255.0, side).flatten(1)


def _decoder(images: ImageRows):  # type: ignore[no-untyped-def]
    def decode(row: int) -> NDArray[np.uint8] | None:
        try:
            return images.decode(row)
        except CorruptImage:
            return None  # the training loop has counted and logged it

    return decode
