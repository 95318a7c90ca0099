"""How far reconstructions G(z_i) are from their images x_i, in pixels.

Legend: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class ReconstructionError:
    """Running sums over image pairs; merge the sums of several workers with `+`."""

    count: int = 0
    l1_sum: float = 0.0
    psnr_sum: float = 0.0

    def update(self, fake_BCHW: Tensor, real_BCHW: Tensor) -> ReconstructionError:
        """These sums with a batch of uint8 pairs added.

        Raises:
            UserError: shapes differ or the images are not uint8.
        """
        l1_B = l1(fake_BCHW, real_BCHW)
        return self + ReconstructionError(len(l1_B), float(l1_B.sum()), float(psnr(fake_BCHW, real_BCHW).sum()))

    def __add__(self, other: ReconstructionError) -> ReconstructionError:
        return ReconstructionError(self.count + other.count, self.l1_sum + other.l1_sum, self.psnr_sum + other.psnr_sum)

    def metrics(self) -> dict[str, float]:
        """`l1` (mean absolute error, image range 0..1) and `psnr` (dB), each a mean over images."""
        if self.count == 0:
            raise UserError("no images were compared, so there is no reconstruction error")
        return {"l1": self.l1_sum / self.count, "psnr": self.psnr_sum / self.count}


# PSNR of identical images is infinite; half a grey level of error in one of 4 million numbers is
# the least that 8-bit images can show, and bounds the mean over images.
PSNR_LIMIT = 100.0


def l1(fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
    """Mean absolute error per image of uint8 pairs, as a share of the range 0..255; float64 [B]."""
    return _difference(fake_BCHW, real_BCHW).abs().flatten(1).mean(1)


def psnr(fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image of uint8 pairs in dB, at most `PSNR_LIMIT`; float64 [B]."""
    mse_B = _difference(fake_BCHW, real_BCHW).square().flatten(1).mean(1)
    return (-10.0 * torch.log10(mse_B)).clamp(max=PSNR_LIMIT)


def _difference(fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
    if fake_BCHW.shape != real_BCHW.shape:
        raise UserError(f"images of shape {tuple(fake_BCHW.shape)} and {tuple(real_BCHW.shape)} cannot be compared")
    if fake_BCHW.dtype != torch.uint8 or real_BCHW.dtype != torch.uint8:
        raise UserError(f"images must be uint8 to be compared, not {fake_BCHW.dtype} and {real_BCHW.dtype}")
    return (fake_BCHW.double() - real_BCHW.double()) / 255.0
