"""Virtual batch normalisation: a row is normalised by a fixed reference batch and by itself, and by no other row.

Shapes: R rows of the reference batch, B other rows, C channels, P places of a feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VirtualBatchNorm(nn.Module):
    """Batch normalisation of [R + B, C] and [R + B, C, ...], whose first R rows are the reference batch.

    A row has the mean and variance of R + 1 rows, the reference and itself; the reference has its own. So a row does
    not depend on its batch, in training and after it, nor on how rows are cut over workers.
    Source: Salimans et al. 2016, Sec. 3.4.
    """

    def __init__(self, channels: int, reference: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.reference, self.eps = channels, reference, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, weight_B: Tensor | None = None) -> Tensor:
        """Normalise `x`; a row of padding is one as any other, so `weight_B` changes nothing."""
        del weight_B
        count = self.reference
        work_BCP = (x if x.dtype == torch.float64 else x.float()).flatten(2) if x.dim() > 2 else x[..., None]
        var_BC, mean_BC = torch.var_mean(work_BCP, 2, correction=0)
        var_C, mean_C = torch.var_mean(work_BCP[:count], (0, 2), correction=0)
        own_B1 = torch.full((len(x), 1), 1 / (count + 1), dtype=mean_C.dtype, device=x.device)
        own_B1[:count] = 0
        apart_BC = mean_BC - mean_C
        centre_BC = mean_C + own_B1 * apart_BC
        spread_BC = (1 - own_B1) * var_C + own_B1 * var_BC + own_B1 * (1 - own_B1) * apart_BC.square()
        scale_BC = self.weight * torch.rsqrt(spread_BC + self.eps)
        out_BCP = (work_BCP - centre_BC[..., None]) * scale_BC[..., None] + self.bias[:, None]
        return out_BCP.view(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, reference={self.reference}, eps={self.eps}"
