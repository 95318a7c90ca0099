"""Use of a worker's processor, memory and GPU, sampled beside its training."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from ...cluster.nodes.memory import usable_memory
from ...errors import one_line
from ...reports.status import DeviceUse
from ..plan.devices import name_of
from .events import DeviceSampled

log = logging.getLogger(__name__)

T = TypeVar("T")
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
        self.failed: set[str] = set()
        psutil.cpu_percent()  # counts from here on
        self.process.cpu_percent()

    def __call__(self) -> None:
        """Send a sample. Never raises: training must not fail with what is only looked at."""
        self.asked("the device", lambda: self.send(self.sample()))

    def asked(self, what: str, ask: Callable[[], T]) -> T | None:
        """The answer to a question; None if there is none, which is reported once."""
        try:
            return ask()
        except Exception as error:
            if what not in self.failed:
                log.warning("%s of worker %d cannot be sampled: %s", what, self.rank, one_line(error))
            self.failed.add(what)
            return None

    def sample(self) -> DeviceSampled:
        """The use since the last sample; numbers have the names and units of MLflow's system metrics.

        Memory is that of the worker's pod, where it has a limit, else of its machine.
        """
        node = usable_memory()
        numbers = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": node.used / MB,
            "system_memory_usage_percentage": 100 * node.used / node.total,
        }
        use: float | None
        if self.device.type == "cuda":
            use, memory, total, more = self.sample_gpu()
        else:
            use, memory, total = (
                self.process.cpu_percent() / 100 / self.cores,
                self.process.memory_info().rss,
                node.total,
            )
            more = {"process_memory_usage_megabytes": memory / MB}
        device = DeviceUse(
            rank=self.rank,
            node=self.node,
            device=self.name,
            gpu=self.device.type == "cuda",
            use=use,
            memory=memory,
            total=total,
        )
        return DeviceSampled(device, numbers | more)

    def sample_gpu(self) -> tuple[float | None, int, int, dict[str, float]]:
        """Use, memory, all its memory, and the numbers of the GPU of this worker, of which it has one.

        A part of a GPU (MIG), or a container without NVIDIA's management library, does not say how busy it is.
        """
        free, total = torch.cuda.mem_get_info(self.device)
        numbers = {
            "gpu_0_memory_usage_megabytes": (total - free) / MB,
            "gpu_0_memory_usage_percentage": 100 * (total - free) / total,
        }
        busy = self.asked("the use of the GPU", lambda: torch.cuda.utilization(self.device))
        if busy is not None:
            numbers["gpu_0_utilization_percentage"] = float(busy)
        power = self.asked("the power of the GPU", lambda: torch.cuda.power_draw(self.device))
        if power is not None:
            numbers["gpu_0_power_usage_watts"] = power / 1000
        return None if busy is None else busy / 100, total - free, total, numbers
