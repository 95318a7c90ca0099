"""The use of a worker's device is sampled beside the training, and a device that cannot be sampled disturbs nothing."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from glann.trainers.run import device_use
from glann.trainers.run.device_use import DeviceSampler
from glann.trainers.run.events import DeviceSampled

CPU = torch.device("cpu")


def sampler(sent: list[DeviceSampled], device: torch.device = CPU) -> DeviceSampler:
    return DeviceSampler(3, device, 1.0, sent.append)


def test_a_busy_worker_on_cpus_is_seen_to_be_busy():
    sent: list[DeviceSampled] = []
    sample = sampler(sent)
    spent = time.process_time()
    while time.process_time() - spent < 0.2:
        sum(range(10_000))
    sample()
    use = sent[0].use
    assert (use.rank, use.gpu) == (3, False)
    assert use.use is not None
    assert use.use > 0.01
    assert 10 << 20 < use.memory < use.total


def test_the_names_are_those_of_mlflows_system_metrics():
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    monitor = CPUMonitor()
    monitor.collect_metrics()
    sent: list[DeviceSampled] = []
    sampler(sent)()
    assert {*monitor.aggregate_metrics()} <= {*sent[0].numbers}


def test_a_gpu_is_asked_for_its_own_use(monkeypatch: pytest.MonkeyPatch):
    cuda = {"device_memory_used": 60 << 30, "utilization": 93, "power_draw": 650_000}
    for name, value in cuda.items():
        assert callable(getattr(torch.cuda, name)), "torch has renamed it"
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(device_use, "name_of", lambda device: "NVIDIA H100")
    sent: list[DeviceSampled] = []
    sampler(sent, torch.device("cuda", 0))()
    use, numbers = sent[0].use, sent[0].numbers
    assert (use.device, use.gpu, use.use, use.total) == ("NVIDIA H100", True, 0.93, 80 << 30)
    assert use.memory == pytest.approx(60 << 30)
    assert numbers["gpu_0_power_usage_watts"] == 650
    assert numbers["gpu_0_memory_usage_percentage"] == 75
    assert numbers["gpu_0_utilization_percentage"] == 93


def test_a_driver_that_does_not_answer_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog):
    def fail(device: torch.device) -> None:
        raise RuntimeError("NVML: unknown error")

    monkeypatch.setattr(torch.cuda, "device_memory_used", fail)
    monkeypatch.setattr(device_use, "name_of", lambda device: "NVIDIA H100")
    sent: list[DeviceSampled] = []
    sample = sampler(sent, torch.device("cuda", 0))
    with caplog.at_level(logging.WARNING):
        sample()
        sample()
    assert [record.getMessage() for record in caplog.records] == [
        "the device of worker 3 cannot be sampled: NVML: unknown error"
    ]
    assert sent == []
