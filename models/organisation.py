"""How far latent codes have moved from their start, and how they are organised.

Legend: K rows of a sample, D latent dimension, F numbers of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 10  # nearest images, one of which the nearest code should belong to
SIDE = 16  # pixels of the images that are compared


def turned(z_KD: Tensor, first_KD: Tensor) -> Tensor:
    """Angle of each code to the direction it started in, in degrees [K]; random directions have 90 on average."""
    z_KD, first_KD = (F.normalize(x.double(), dim=1) for x in (z_KD, first_KD))
    chord_K = (z_KD - first_KD).norm(dim=1)  # exact for small angles, where the cosine is not
    return torch.rad2deg(2 * torch.asin((chord_K / 2).clamp(max=1)))


def effective_dimension(z_KD: Tensor) -> float:
    """Participation ratio of the eigenvalues of the covariance, (sum l)^2 / sum l^2: between 1 and D.

    0 if all codes are equal. A sample of K rows of a code that fills D dimensions evenly has K D / (K + D).
    """
    centred_KD = z_KD.double() - z_KD.double().mean(0)
    covariance_DD = centred_KD.T @ centred_KD / len(z_KD)
    squares = float(covariance_DD.square().sum())
    return float(covariance_DD.trace()) ** 2 / squares if squares else 0.0


def small_images(img_BCHW: Tensor) -> Tensor:
    """Images [B, F] averaged down to `SIDE` pixels, for `nearest_images`."""
    return F.adaptive_avg_pool2d(img_BCHW.float(), min(SIDE, img_BCHW.shape[-1])).flatten(1)


def nearest_images(x_KF: Tensor) -> Tensor:
    """The `NEIGHBOURS` nearest other images of each [K, n], fewer where the sample is small: at most a tenth of it."""
    count = max(1, min(NEIGHBOURS, len(x_KF) // 10))
    return _distances(x_KF).topk(count, largest=False).indices


def agreement(z_KD: Tensor, near_Kn: Tensor) -> float:
    """Share of rows whose nearest code is that of one of their nearest images; n / (K - 1) for random codes."""
    nearest_K = _distances(z_KD).argmin(1)
    return float((near_Kn == nearest_K[:, None]).any(1).double().mean())


def _distances(x_KF: Tensor) -> Tensor:
    """Euclidean distances [K, K], with infinity on the diagonal."""
    return torch.cdist(x_KF.float(), x_KF.float()).fill_diagonal_(torch.inf)
