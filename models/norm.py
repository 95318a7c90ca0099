"""Batch normalisation with statistics over the real rows of all workers.

Shapes: B batch of this worker, C channels, S spatial positions, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from .comm import broadcast, gather, world_size


class SharedBatchNorm(nn.Module):
    """Batch normalisation over the real rows of the global batch, for [B, C] and [B, C, ...].

    In train mode mean and variance are taken over every row with weight 1 on every worker (the
    default process group, or this process alone), so results do not depend on how a batch is cut, and
    padding rows have no effect.  A worker may hold no real row, or no row at all, but every worker
    must make the call.  Eval mode uses the running statistics, without communication.

    Parameters, buffers, `eps`, `momentum` and their state dict names are those of `nn.BatchNorm2d`.
    As in any data-parallel layer, `weight.grad` and `bias.grad` hold this worker's share; the engine adds them up.
    Gradients may be differentiated again (gradient penalties), any number of times: with `create_graph=True` every
    worker must make each backward call, as every worker must make each forward call.
    Source: Ioffe & Szegedy 2015; merging of partial moments: Chan, Golub & LeVeque 1979.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.record: Callable[[SharedBatchNorm, Tensor, Tensor, Tensor], None] = SharedBatchNorm.track

    def forward(self, x: Tensor, weight_B: Tensor | None = None) -> Tensor:
        """Normalise `x` [B, C, ...]; `weight_B` is 1 for real rows and 0 for padding (None: all real)."""
        if not self.training:
            return _normalise(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        out, mean_C, var_C, count = _shared_batch_norm(x, weight_B, self.weight, self.bias, self.eps)
        self.record(self, mean_C, var_C, count)
        return out

    def fix_statistics(self, x: Tensor) -> None:
        """Set the running statistics to the mean and variance of `x` [B, C], which must be equal on all workers."""
        variance_C, mean_C = torch.var_mean(x.double(), dim=0)
        self.set_statistics(mean_C, variance_C)

    @torch.no_grad()
    def set_statistics(self, mean_C: Tensor, var_C: Tensor) -> None:
        """Set the running mean and the (unbiased) running variance, which must be equal on all workers."""
        for held, found in ((self.running_mean, mean_C), (self.running_var, var_C)):
            held.copy_(found)
            broadcast(held)  # machines may round differently

    @torch.no_grad()
    def track(self, mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
        """Move the running statistics by the moments of a batch: mean, biased variance and number of values."""
        # No branch on `count`, which would synchronise the device. A global batch without rows has rate 0.
        rate = self.momentum * (count > 0).to(count.dtype)
        unbiased_C = var_C * (count / (count - 1).clamp(min=1))
        self.running_mean += (rate * (mean_C - self.running_mean)).to(self.running_mean.dtype)
        self.running_var += (rate * (unbiased_C - self.running_var)).to(self.running_var.dtype)
        self.num_batches_tracked += (count > 0).to(torch.long)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}"


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Do not update running statistics: activation checkpointing runs the forward pass twice."""
    with _recording(module, lambda *moments: None):
        yield


@contextmanager
def pending_statistics(module: nn.Module) -> Iterator[PendingMoments]:
    """Keep the moments of batches inside the block from the running statistics until `commit`; without it, for ever."""
    pending = PendingMoments()
    with _recording(module, pending.add):
        yield pending


class PendingMoments:
    """Moments of batches, equal on all workers, that have not moved the running statistics of their layers yet."""

    def __init__(self) -> None:
        self.moments: list[tuple[SharedBatchNorm, Tensor, Tensor, Tensor]] = []

    def add(self, layer: SharedBatchNorm, mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
        self.moments.append((layer, mean_C, var_C, count))

    def fault(self, device: torch.device) -> Tensor:
        """0, or NaN if any of them would leave running statistics that are not finite; a float32 scalar."""
        fault = torch.zeros((), device=device)
        for layer, mean_C, var_C, _ in self.moments:
            kept = torch.cat([mean_C, var_C]).to(layer.running_mean.dtype)
            fault += torch.where(torch.isfinite(kept).all(), 0.0, torch.nan)
        return fault

    def commit(self, applied: Tensor | None = None) -> None:
        """Move the running statistics, in the order of the calls.

        Args:
            applied: a bool on their device; if it is false, nothing moves. None: true.
        """
        for layer, mean_C, var_C, count in self.moments:
            if applied is not None:  # the moments may be NaN; a count of 0 moves nothing
                mean_C = torch.where(applied, mean_C, layer.running_mean)
                var_C = torch.where(applied, var_C, layer.running_var)
                count = torch.where(applied, count, 0)
            layer.track(mean_C, var_C, count)
        self.moments.clear()


@contextmanager
def _recording(module: nn.Module, record: Callable[[SharedBatchNorm, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `record` with a layer and its moments in place of `SharedBatchNorm.track`."""
    layers = [layer for layer in module.modules() if isinstance(layer, SharedBatchNorm)]
    before = [layer.record for layer in layers]
    for layer in layers:
        layer.record = record
    try:
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer.record = kept


def _normalise(x: Tensor, mean_C: Tensor, var_C: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    scale_C = weight_C * torch.rsqrt(var_C + eps)
    shift_C = bias_C - mean_C * scale_C
    return (x * _over_channels(scale_C, x) + _over_channels(shift_C, x)).to(x.dtype)


def _over_channels(value_C: Tensor, like: Tensor) -> Tensor:
    return value_C.view(1, -1, *[1] * (like.dim() - 2))


# Collectives inside a compiled graph gain nothing here and have broken compilers before.
@torch.compiler.disable
def _shared_batch_norm(
    x: Tensor, weight_B: Tensor | None, weight_C: Tensor, bias_C: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _SharedBatchNorm.apply(x, weight_B, weight_C, bias_C, eps)


class _SharedBatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and var of all real rows of all workers."""

    @staticmethod
    def forward(ctx, x, weight_B, weight_C, bias_C, eps):  # type: ignore[no-untyped-def]
        # Half-precision activations: moments and the normalisation in float32.
        work = x if x.dtype == torch.float64 else x.float()
        mask = None if weight_B is None else weight_B.to(work.dtype).view(-1, *[1] * (x.dim() - 1))
        dims = [0, *range(2, x.dim())]
        spatial = x[0].numel() // x.shape[1] if len(x) else 1
        rows = torch.full((), len(x), dtype=torch.float64, device=x.device) if mask is None else mask.sum().double()
        count_local = rows * spatial
        divisor = count_local.clamp(min=1).to(work.dtype)
        mean_local_C = (work if mask is None else work * mask).sum(dims) / divisor
        deviation = work - _over_channels(mean_local_C, x)
        spread = deviation.square() if mask is None else deviation.square() * mask
        mean_C, var_C, count = _merge(count_local, mean_local_C, spread.sum(dims))
        invstd_C = torch.rsqrt(var_C + eps).to(work.dtype)
        mean_work_C = mean_C.to(work.dtype)
        ctx.save_for_backward(x, mask, weight_C, mean_work_C, invstd_C, count)
        normal = (work - _over_channels(mean_work_C, x)) * _over_channels(invstd_C, x)
        out = (normal * _over_channels(weight_C, x) + _over_channels(bias_C, x)).to(x.dtype)
        ctx.mark_non_differentiable(mean_C, var_C, count)
        return out, mean_C, var_C, count

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        x, mask, weight_C, mean_C, invstd_C, count = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            mean_C, invstd_C = _SharedMoments.apply(x, mask, mean_C, invstd_C, count)
        dims = [0, *range(2, x.dim())]
        work = grad.to(invstd_C.dtype)
        normal = (x.to(invstd_C.dtype) - _over_channels(mean_C, x)) * _over_channels(invstd_C, x)
        grad_bias_C, grad_weight_C = work.sum(dims), (work * normal).sum(dims)
        # Every row of every worker depends on the shared moments: their gradient is summed over all workers
        # and flows back to the real rows only.
        total_2C = _sum_over_workers(torch.stack([grad_bias_C, grad_weight_C]))
        total_2C = total_2C / count.clamp(min=1).to(total_2C.dtype)
        through = _over_channels(total_2C[0], x) + normal * _over_channels(total_2C[1], x)
        if mask is not None:
            through = through * mask
        grad_x = (work - through) * _over_channels(weight_C * invstd_C, x)
        dtype = weight_C.dtype
        return grad_x.to(x.dtype), None, grad_weight_C.to(dtype), grad_bias_C.to(dtype), None


class _SharedMoments(torch.autograd.Function):
    """The saved mean and 1 / sqrt(var + eps) of all real rows of all workers, as functions of `x`.

    `_SharedBatchNorm` saves both as constants. Double backward needs them as functions of the rows; their values
    stay the same bit for bit, and there is no communication until then.
    """

    @staticmethod
    def forward(ctx, x, mask, mean_C, invstd_C, count):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, mask, mean_C, invstd_C, count)
        return mean_C.clone(), invstd_C.clone()

    @staticmethod
    def backward(ctx, grad_mean_C, grad_invstd_C):  # type: ignore[no-untyped-def]
        x, mask, mean_C, invstd_C, count = ctx.saved_tensors
        if torch.is_grad_enabled():
            mean_C, invstd_C = _SharedMoments.apply(x, mask, mean_C, invstd_C, count)
        # d mean / dx = 1 / count; d invstd / dx = -invstd^3 (x - mean) / count, for real rows.
        normal = (x.to(invstd_C.dtype) - _over_channels(mean_C, x)) * _over_channels(invstd_C, x)
        total_2C = _sum_over_workers(torch.stack([grad_mean_C, grad_invstd_C]))
        total_2C = total_2C / count.clamp(min=1).to(total_2C.dtype)
        through = _over_channels(total_2C[0], x) - normal * _over_channels(total_2C[1] * invstd_C.square(), x)
        if mask is not None:
            through = through * mask
        return through.to(x.dtype), None, None, None, None


def _sum_over_workers(value: Tensor) -> Tensor:
    """Sum over workers, differentiable any number of times."""
    return all_reduce(value.contiguous()) if world_size() > 1 else value


def _merge(count: Tensor, mean_C: Tensor, spread_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and row count over all workers' rows, equal bit for bit on all workers.

    Moments are gathered rather than summed: an all-reduce may add in another order on another rank.
    """
    partial = torch.cat([count.view(1), mean_C.double(), spread_C.double()])
    total, mean_all_C, spread_all_C = merge_moments(gather(partial)).split([1, len(mean_C), len(mean_C)])
    return mean_all_C, spread_all_C / total.clamp(min=1), total[0]


def merge_moments(part_PM: Tensor) -> Tensor:
    """Merge the moments of P parts of a batch, [P, 1 + 2C]: count, means, sums of squared deviations from these.

    Not E[x^2] - E[x]^2, which would cancel. Source: Chan, Golub & LeVeque 1979.
    """
    channels = part_PM.shape[1] // 2
    count_P1, mean_PC, spread_PC = part_PM.split([1, channels, channels], dim=1)
    total = count_P1.sum()
    mean_C = (count_P1 * mean_PC).sum(0) / total.clamp(min=1)
    return torch.cat([total[None], mean_C, (spread_PC + count_P1 * (mean_PC - mean_C).square()).sum(0)])
