"""Use of a worker's processor, memory and GPU, sampled beside its training."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import psutil
import torch

from ...errors import one_line
from ...reports.status import DeviceUse
from ..plan.devices import name_of
from .events import DeviceSampled

log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 10.0
MB = 1e6  # MLflow's


class DeviceSampler:
    """Samples the device of a worker, and the node that it is on.

    Args:
        cores: that the worker may use.
        send: called with every sample.
    """

    def __init__(self, rank: int, device: torch.device, cores: float, send: Callable[[DeviceSampled], None]) -> None:
        self.rank, self.device, self.cores, self.send = rank, device, cores, send
        self.name, self.node, self.process = name_of(device), socket.gethostname(), psutil.Process()
        self.failing = False
        psutil.cpu_percent()  # counts from here on
        self.process.cpu_percent()

    def __call__(self) -> None:
        """Send a sample. Never raises: training must not fail with a driver that does not answer."""
        try:
            self.send(self.sample())
            self.failing = False
        except Exception as error:
            if not self.failing:
                log.warning("the device of worker %d cannot be sampled: %s", self.rank, one_line(error))
            self.failing = True

    def sample(self) -> DeviceSampled:
        """The use since the last sample; numbers have the names and units of MLflow's system metrics."""
        memory = psutil.virtual_memory()
        numbers = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
        }
        known = {"rank": self.rank, "node": self.node, "device": self.name}
        if self.device.type == "cuda":
            gpu = self.sample_gpu()
            used, total = int(gpu["gpu_0_memory_usage_megabytes"] * MB), self.gpu_memory
            use = DeviceUse(**known, gpu=True, use=gpu["gpu_0_utilization_percentage"] / 100, memory=used, total=total)
            return DeviceSampled(use, numbers | gpu)
        busy = self.process.cpu_percent() / 100 / self.cores
        used = self.process.memory_info().rss
        numbers["process_memory_usage_megabytes"] = used / MB
        return DeviceSampled(DeviceUse(**known, gpu=False, use=busy, memory=used, total=memory.total), numbers)

    @property
    def gpu_memory(self) -> int:
        """Bytes of memory of the GPU."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def sample_gpu(self) -> dict[str, float]:
        """The GPU of this worker, asked of NVIDIA's management library, which does not wait for CUDA."""
        used = torch.cuda.device_memory_used(self.device)
        return {
            "gpu_0_utilization_percentage": float(torch.cuda.utilization(self.device)),
            "gpu_0_memory_usage_megabytes": used / MB,
            "gpu_0_memory_usage_percentage": 100 * used / self.gpu_memory,
            "gpu_0_power_usage_watts": torch.cuda.power_draw(self.device) / 1000,
        }
