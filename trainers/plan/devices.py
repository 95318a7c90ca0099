"""Peak rates and memory of accelerators, from their data sheets."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from ...config.sections import EngineConfig


@dataclass(frozen=True)
class Gpu:
    """Dense peaks in TFLOP/s (without sparsity) and memory in GiB. mark: part of the name that CUDA reports."""

    name: str
    mark: str
    bf16: float
    fp32: float
    memory: float

    def peak(self, engine: EngineConfig) -> float:
        """Peak FLOP/s at the engine's precision."""
        return (self.bf16 if engine.precision == "bf16" else self.fp32) * 1e12


GPUS = (
    Gpu("A10G", "A10G", 70.0, 35.0, 22.5),
    Gpu("A100 80 GB", "A100", 312.0, 19.5, 79.0),
    Gpu("H100 SXM", "H100", 989.0, 67.0, 79.0),
    Gpu("H200", "H200", 989.0, 67.0, 139.0),
)


def peak_of(device: torch.device, engine: EngineConfig) -> float | None:
    """Peak FLOP/s of a device, or None where no data sheet is known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    gpu = gpu_of(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak(engine)


def gpu_of(name: str) -> Gpu | None:
    """The data sheet of a GPU by the name that CUDA reports; None if it is not known."""
    return next((gpu for gpu in GPUS if gpu.mark in name), None)


def name_of(device: torch.device) -> str:
    """The product name of a GPU, or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
