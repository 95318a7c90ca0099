"""Pixel errors between reconstructions G(z_i) and their images x_i.

Legend: B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

# The PSNR of identical images is infinite; the limit keeps the mean over images finite. It is about the PSNR
# of half a grey level of error in one of 4 million values.
PSNR_LIMIT = 100.0


def l1(fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
    """Mean absolute error per image of uint8 pairs, as a fraction of the range 0..255; float64 [B]."""
    return difference(fake_BCHW, real_BCHW).abs().flatten(1).mean(1)


def psnr(fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image of uint8 pairs in dB, at most `PSNR_LIMIT`; float64 [B]."""
    mse_B = difference(fake_BCHW, real_BCHW).square().flatten(1).mean(1)
    return (-10.0 * torch.log10(mse_B)).clamp(max=PSNR_LIMIT)


def difference(fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
    """fake - real of uint8 images, as a fraction of the range 0..255; float64 [B, C, H, W].

    Raises:
        UserError: shapes differ or the images are not uint8.
    """
    if fake_BCHW.shape != real_BCHW.shape:
        raise UserError(f"images of shape {tuple(fake_BCHW.shape)} and {tuple(real_BCHW.shape)} cannot be compared")
    if fake_BCHW.dtype != torch.uint8 or real_BCHW.dtype != torch.uint8:
        raise UserError(f"images must be uint8 to be compared, not {fake_BCHW.dtype} and {real_BCHW.dtype}")
    return (fake_BCHW.double() - real_BCHW.double()) / 255.0
