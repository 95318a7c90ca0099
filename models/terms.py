"""Terms that look at all rows of a batch, through statistics that are merged exactly over workers.

A term is the same number on every worker, so the number of workers and the order of rows change nothing. It is no sum
over rows, so an engine must see the whole batch at once: the configuration refuses them with gradient accumulation.

Shapes: B batch of this worker, C dimension of a kernel, F features, K kernels, N = W B rows of W workers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from .comm import rank, world_size


def over_workers(value: Tensor) -> Tensor:
    """The sum over all workers, differentiable; a collective call, also in the backward pass."""
    return all_reduce(value.contiguous()) if world_size() > 1 else value


def feature_matching(fake_BF: Tensor, real_BF: Tensor, weight_B: Tensor) -> Tensor:
    """|E f(x) - E f(G)|^2 over the real rows of all workers, a scalar. Source: Salimans et al. 2016, Sec. 3.1."""
    difference_F = (weight_B[:, None] * (real_BF - fake_BF)).sum(0)
    return (over_workers(difference_F) / over_workers(weight_B.sum())).square().sum()


def pull_away(features_BF: Tensor, weight_B: Tensor) -> Tensor:
    """Mean squared cosine of all pairs of rows of all workers, a scalar. Source: Zhao et al. 2017 (EBGAN), Eq. 4.

    sum_ij (u_i u_j)^2 is the squared norm of sum_i u_i u_i^T, which is merged in place of the rows.
    """
    unit_BF = F.normalize(features_BF, dim=1) * weight_B[:, None]
    moment_FF, count = over_workers(unit_BF.T @ unit_BF), over_workers(weight_B.sum())
    return (moment_FF.square().sum() - count) / (count * (count - 1)).clamp(min=1)


def likeness(kernel_BKC: Tensor, weight_B: Tensor) -> Tensor:
    """How near each row is to the other real rows of all workers, [B, K]: sum_j exp(-|M_ik - M_jk|_1), j != i.

    Source: Salimans et al. 2016, Sec. 3.2 (minibatch discrimination). The rows of all workers are compared with each
    worker's own: O(rows of the batch) memory a row.
    """
    own, count = rank(), world_size()
    places_WBKC = torch.zeros(count, *kernel_BKC.shape, dtype=kernel_BKC.dtype, device=kernel_BKC.device)
    places_WB = torch.zeros(count, len(weight_B), dtype=kernel_BKC.dtype, device=kernel_BKC.device)
    places_WBKC[own], places_WB[own] = kernel_BKC, weight_B
    all_NKC, weight_N = over_workers(places_WBKC).flatten(0, 1), over_workers(places_WB).flatten()
    apart_BNK = (kernel_BKC[:, None] - all_NKC[None]).abs().sum(3)
    others_BN = weight_N.repeat(len(kernel_BKC), 1)
    others_BN[:, own * len(weight_B) :][:, : len(weight_B)].fill_diagonal_(0)
    return (torch.exp(-apart_BNK) * others_BN[:, :, None]).sum(1)
