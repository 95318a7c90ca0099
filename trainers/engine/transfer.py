"""Copies between the CPU and a device for which the host does not wait; on a CPU, the tensors themselves.

Page-locked memory comes from torch's own allocator, which keeps a block until its copy is done and then hands it out
again: a ring of as many blocks as are in use.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Upload:
    """Copies to a device on a stream of their own, beside the computation, which waits for them on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; a tensor on the CPU may be changed as soon as this returns, unless it is pinned."""
        if self.stream is None or tensor.device == self.device:
            return tensor.to(self.device)
        with torch.cuda.stream(self.stream):
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
        reader = torch.cuda.current_stream(self.device)
        reader.wait_stream(self.stream)
        copy.record_stream(reader)
        return copy


class Download:
    """Tensors on their way from the device."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors: tuple[Tensor, ...] = tensors
        self.copied: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self.tensors = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            )
            self.copied = torch.cuda.Event(blocking=True)  # the thread sleeps: decoding needs its processor
            self.copied.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the CPU."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensors
