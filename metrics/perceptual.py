"""Perceptual distance between reconstructions and their images (Zhang et al. 2018, Eq. 1, with equal weights).

Legend: B batch, C channels, H, W positions of a feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .features.extractor import BATCH, Extractor
from .parallel import on_one_core_each


def perceptual_distance(fake_BCHW: Tensor, real_BCHW: Tensor, extractor: Extractor) -> Tensor:
    """Sum over feature maps of the mean over positions of |u - v|^2, u and v the features in unit length; float64 [B].

    LPIPS weighs the channels by human judgements; here all weigh 1, so values are not those of LPIPS.

    Args:
        fake_BCHW, real_BCHW: uint8 images.
    """

    @torch.inference_mode()  # holds for one thread only
    def distance(pair: tuple[Tensor, Tensor]) -> Tensor:
        maps = zip(*(extractor.maps(img_BCHW) for img_BCHW in pair), strict=True)
        return torch.stack([_unit_distance(u_BCHW, v_BCHW) for u_BCHW, v_BCHW in maps]).sum(0).cpu()

    pairs = zip(fake_BCHW.split(BATCH), real_BCHW.split(BATCH), strict=True)
    return torch.cat(list(on_one_core_each(distance, pairs)))


def _unit_distance(u_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    difference_BCHW = F.normalize(u_BCHW, dim=1) - F.normalize(v_BCHW, dim=1)
    return difference_BCHW.double().square().sum(1).mean((1, 2))
