"""Cost of a module per image: parameters, floating-point operations, and memory in training and in use.

Measured, not estimated by formula: the module's forward and backward pass run on `meta` tensors, which
have shapes and no values, so 1024 px take seconds and no memory.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .norm import SharedBatchNorm


@dataclass(frozen=True)
class Cost:
    """The cost of one module for one image.

    Attributes:
        parameters: trainable parameters.
        frozen_parameters: other parameters.
        forward_flops: FLOPs of convolutions and matrix products in a forward pass; a multiply-add counts two.
        backward_flops: the same for the backward pass, to the first input and the trainable parameters.
    """

    parameters: int
    frozen_parameters: int
    forward_flops: int
    backward_flops: int

    @property
    def flops(self) -> int:
        """Forward and backward pass together."""
        return self.forward_flops + self.backward_flops


def cost(module: nn.Module, *input_shapes: Sequence[int]) -> Cost:
    """Measure a generator, a mapping or a loss on one image.

    Args:
        input_shapes: shape of each tensor argument, without the batch dimension: `cost(G, (64,))`,
            `cost(loss, (3, 256, 256), (3, 256, 256))`.  Gradients flow to the first.  In train mode a
            loss with patches is measured with patches.

    The module is neither moved nor changed.
    """
    twin = _without_values(module)
    inputs = [torch.empty((1, *shape), device="meta", requires_grad=i == 0) for i, shape in enumerate(input_shapes)]
    with FlopCounterMode(display=False) as forward:
        out = twin(*inputs, **_patches(module, 1))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Cost(
        parameters=trainable,
        frozen_parameters=sum(p.numel() for p in module.parameters()) - trainable,
        forward_flops=forward.get_total_flops(),
        backward_flops=backward.get_total_flops(),
    )


def inference_bytes(module: nn.Module, *input_shapes: Sequence[int]) -> int:
    """Most bytes of intermediate and final results alive at once while the module computes one image.

    Without autograd, parameters and inputs, and without what the kernels of a device take for themselves: a 1024 px
    generator on a CPU takes as much as this says for each of four images, and 1.3 times as much for a single one.
    """
    twin = _without_values(module).eval()
    inputs = [torch.empty((1, *shape), device="meta") for shape in input_shapes]
    live = _LiveBytes([*twin.parameters(), *twin.buffers(), *inputs])
    with torch.no_grad(), live:
        twin(*inputs)
    return live.peak


def training_bytes(module: nn.Module, batch: int, *input_shapes: Sequence[int]) -> int:
    """Most bytes of results and gradients alive at once in a step on a batch: forward and backward, to the first input.

    Of parameters, their gradients and the inputs only what is made of them meanwhile counts. In the module's own
    precision (float32); the kernels' own memory is not included. Arguments are those of `cost`.
    """
    twin = _without_values(module)
    inputs = [torch.empty((batch, *shape), device="meta", requires_grad=i == 0) for i, shape in enumerate(input_shapes)]
    trained = [tensor for tensor in (*twin.parameters(), *inputs) if tensor.requires_grad]
    for tensor in trained:
        tensor.grad = torch.zeros_like(tensor)  # so that those of the step are added to it and freed
    own = [
        *twin.parameters(),
        *twin.buffers(),
        *inputs,
        *(tensor.grad for tensor in trained if tensor.grad is not None),
    ]
    live = _LiveBytes(own)
    with live:
        twin(*inputs, **_patches(module, batch)).sum().backward()
    return live.peak


def _patches(module: nn.Module, batch: int) -> dict[str, Tensor]:
    """The further argument of a loss that sees patches."""
    seeded = bool(getattr(module, "patch", None))
    return {"patch_seed_B": torch.empty(batch, dtype=torch.int64, device="meta")} if seeded else {}


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, without those of the given tensors."""

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.peak = self.now = 0
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self.own and address not in self.alive:
            self.alive[address] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.remove, address)

    def remove(self, address: int) -> None:
        self.now -= self.alive.pop(address)


def _without_values(module: nn.Module) -> nn.Module:
    """Copy the module to `meta`; the memo of deepcopy maps every tensor to an empty one."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    twin = copy.deepcopy(module, memo)
    for layer in twin.modules():
        if isinstance(layer, SharedBatchNorm):
            layer.eval()  # no collectives: only this process measures
    return twin
