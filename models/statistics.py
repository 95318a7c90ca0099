"""Exact statistics of BatchNorm: those of all inputs of all workers, as one batch.

Running statistics follow the weights of the last steps. Weights that no batch went through, such as a moving average,
need statistics of their own (Izmailov et al. 2018, Sec. 3.2; Wu & Johnson 2021, Sec. 3).

Shapes: B batch, C channels, D dimension of an input, M = 1 + 2C moments, n inputs of this worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .comm import gather
from .norm import SharedBatchNorm, merge_moments


@torch.no_grad()
def set_exact_statistics(network: nn.Module, input_nD: Tensor, batch: int) -> None:
    """Set the running statistics of all BatchNorm layers to the mean and variance over the inputs of all workers.

    Collective. One pass per layer, in the order of their calls: what reaches a layer depends on the statistics of those
    before it. Moments are merged in float64, so that the result does not depend on how the inputs are cut and placed,
    but for the rounding of the network's own arithmetic, and it is equal bit for bit on all workers.

    Args:
        network: the same on all workers; put in eval mode. Of a layer that is called several times all calls count.
        batch: inputs at a time.
    """
    network.eval()
    todo = {layer for layer in network.modules() if isinstance(layer, SharedBatchNorm)}
    while todo:
        with _first_called(todo) as found:
            for part_BD in input_nD.split(batch):
                network(part_BD)
        if not found:
            return  # the network has layers that it does not call
        ((layer, own_M),) = found.items()
        count, mean_C, spread_C = merge_moments(gather(own_M)).split([1, layer.channels, layer.channels])
        layer.set_statistics(mean_C, spread_C / (count - 1).clamp(min=1))
        todo.remove(layer)


@contextmanager
def _first_called(layers: set[SharedBatchNorm]) -> Iterator[dict[SharedBatchNorm, Tensor]]:
    """The first of the layers to be called inside the block, with the moments of its inputs; empty if none is."""
    found: dict[SharedBatchNorm, Tensor] = {}

    def measure(layer: SharedBatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if layer in found:
            found[layer] = merge_moments(torch.stack([found[layer], moments(inputs[0])]))
        elif not found:
            found[layer] = moments(inputs[0])

    hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def moments(x: Tensor) -> Tensor:
    """Moments [M] of x [B, C, ...], float64; see `merge_moments`."""
    work_CX = x.double().transpose(0, 1).flatten(1)
    mean_C = work_CX.sum(1) / max(work_CX.shape[1], 1)
    count = torch.full((1,), work_CX.shape[1], dtype=torch.float64, device=x.device)
    return torch.cat([count, mean_C, (work_CX - mean_C[:, None]).square().sum(1)])
