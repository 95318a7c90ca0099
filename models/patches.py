"""Random square patches of images, placed by one seed per image.

The place of an image's patch is a function of (seed, epoch, row): a resumed run, another batch size
or another number of workers gives the same patches, bit for bit.

The hash is SplitMix64's, not the Philox of `noise.py`: a patch needs one number of 64 bits from one of 64 bits, which
this gives in a handful of operations that compile into the loss; Philox takes ten rounds for four words. Both are
functions of a counter; to use one for both would cut other patches in runs that are resumed.

Shapes: B batch, C channels, H and W pixels, P side of the patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIX_A, MIX_B, GOLDEN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15


def patch_seeds(seed: int, epoch: int, rows_B: Tensor) -> Tensor:
    """One int64 seed per row, a pure function of (seed, epoch, row); for the losses' `patch_seed_B`."""
    start = _mix(torch.tensor(seed, dtype=torch.int64) + _signed(GOLDEN))
    start = _mix(start ^ _mix(torch.tensor(epoch, dtype=torch.int64) + _signed(GOLDEN)))
    return _mix(rows_B.to(torch.int64) * _signed(GOLDEN) + start.to(rows_B.device))


def crop(img_BCHW: Tensor, side: int, seed_B: Tensor) -> Tensor:
    """Crop a square of `side` pixels from each image, [B, C, P, P]; the place depends on its seed only."""
    height, width = img_BCHW.shape[-2:]
    if min(height, width) < side:
        raise ValueError(f"a patch of {side} px does not fit into {height} x {width} px")
    seed_B = seed_B.to(device=img_BCHW.device, dtype=torch.int64)
    top_B = _mix(seed_B + 1).remainder(height - side + 1)
    left_B = _mix(seed_B + 2).remainder(width - side + 1)
    offsets_P = torch.arange(side, device=img_BCHW.device)
    row_BP, column_BP = top_B[:, None] + offsets_P, left_B[:, None] + offsets_P
    # One side after the other: the gradient of an index of both is sorted before it is added up, that of this is not.
    strip_BCPW = img_BCHW.gather(2, row_BP[:, None, :, None].expand(-1, img_BCHW.shape[1], -1, width))
    return strip_BCPW.gather(3, column_BP[:, None, None, :].expand(-1, img_BCHW.shape[1], side, -1))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014) on int64, whose products wrap."""
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_A)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_B)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
