"""What a module costs: parameters, floating-point operations and activation memory, per image.

Nothing is estimated by formula: the module's own forward and backward pass is run on `meta` tensors,
which have shapes and no values, so 1024 px take seconds and no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from .norm import SharedBatchNorm


@dataclass(frozen=True)
class Cost:
    """The cost of one module for one image.

    Attributes:
        parameters: trainable parameters.
        frozen_parameters: the others.
        forward_flops: of convolutions and matrix products in one forward pass; a multiply-add is two.
        backward_flops: likewise for the backward pass: through the module to its first input, and to
            the trainable parameters.
        activation_bytes: what autograd keeps between the two passes, in the module's own precision
            (float32; half of it under bf16 autocast), parameters not counted.
    """

    parameters: int
    frozen_parameters: int
    forward_flops: int
    backward_flops: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        """Forward and backward pass together."""
        return self.forward_flops + self.backward_flops


def cost(module: nn.Module, *input_shapes: Sequence[int]) -> Cost:
    """Measure a generator, a mapping or a loss on one image.

    Args:
        input_shapes: of each tensor argument, without the batch dimension: `cost(G, (64,))`,
            `cost(loss, (3, 256, 256), (3, 256, 256))`.  Gradients flow to the first.  In train mode a
            loss with patches is measured with patches.

    The module is neither moved nor changed, whatever device it is on.
    """
    twin = _without_values(module)
    inputs = [torch.empty((1, *shape), device="meta", requires_grad=i == 0) for i, shape in enumerate(input_shapes)]
    extra = {}
    if getattr(module, "patch", None):
        extra["patch_seed_B"] = torch.empty(1, dtype=torch.int64, device="meta")
    saved = _SavedBytes([*twin.parameters(), *twin.buffers()])
    with FlopCounterMode(display=False) as forward, saved_tensors_hooks(saved.pack, saved.unpack):
        out = twin(*inputs, **extra)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Cost(
        parameters=trainable,
        frozen_parameters=sum(p.numel() for p in module.parameters()) - trainable,
        forward_flops=forward.get_total_flops(),
        backward_flops=backward.get_total_flops(),
        activation_bytes=saved.bytes,
    )


class _SavedBytes:
    """Adds up the distinct storages autograd saves, leaving out the module's own tensors."""

    def __init__(self, own: list[Tensor]) -> None:
        self.bytes = 0
        self.seen: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in own}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = tensor  # kept alive, so that no other tensor takes its address
            self.bytes += storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


def _without_values(module: nn.Module) -> nn.Module:
    """A copy of the module on `meta`: deepcopy finds every tensor already "copied", so none is."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    twin = copy.deepcopy(module, memo)
    for layer in twin.modules():
        if isinstance(layer, SharedBatchNorm):
            layer.eval()  # this process measures alone: no collective
    return twin
