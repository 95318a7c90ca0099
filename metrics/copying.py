"""The training image nearest to each sample, to detect copying.

Legend: N samples, R training rows, P pixels compared.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..datasets.reader import CorruptImage, ImageRows
from ..errors import UserError

COMPARED_SIDE = (
    64  # larger images are averaged down to this side: copies stay recognisable, and a million rows affordable
)
DEFAULT_LIMIT = 50_000
CHUNK = 256


@dataclass(frozen=True)
class NearestImages:
    """`rows_N` of the data set, their images, and the root mean square difference of pixels (range 0..1)."""

    rows_N: NDArray[np.int64]
    img_NHWC: NDArray[np.uint8]
    distance_N: NDArray[np.float64]
    searched: int


def nearest_images(
    sample_NHWC: NDArray[np.uint8], images: ImageRows, *, threads: int = 2, limit: int = DEFAULT_LIMIT
) -> NearestImages:
    """Search the training images (evenly spaced ones if there are more than `limit`) by pixel distance.

    Exact among the searched images; ties go to the lowest row.  Corrupt images are skipped.
    """
    sample_NP = _pixels(torch.from_numpy(sample_NHWC).permute(0, 3, 1, 2))
    best_N = torch.full((len(sample_NP),), torch.inf, dtype=torch.float64)
    row_N = torch.full((len(sample_NP),), -1, dtype=torch.int64)
    searched_R = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(np.int64))
    with ThreadPoolExecutor(threads) as pool:
        rows = iter(searched_R.tolist())
        while chunk := list(islice(rows, CHUNK)):
            decoded = [
                (row, img) for row, img in zip(chunk, pool.map(_decoder(images), chunk), strict=True) if img is not None
            ]
            if not decoded:
                continue
            img_RCHW = torch.from_numpy(np.stack([img for _, img in decoded]))
            distance_NR = torch.cdist(
                sample_NP, _pixels(img_RCHW), compute_mode="donot_use_mm_for_euclid_dist"
            ).double()
            nearest_N, at_N = distance_NR.min(1)
            chunk_rows_R = torch.tensor([row for row, _ in decoded])
            closer_N = nearest_N < best_N
            best_N = torch.where(closer_N, nearest_N, best_N)
            row_N = torch.where(closer_N, chunk_rows_R[at_N], row_N)
    if bool((row_N < 0).any()):
        raise UserError("no training image could be read to compare the samples with; run `glann data verify`")
    found = np.stack([images.decode(row) for row in row_N.tolist()])
    rms_N = best_N.numpy() / np.sqrt(sample_NP.shape[1])
    return NearestImages(row_N.numpy(), found.transpose(0, 2, 3, 1), rms_N, len(searched_R))


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
