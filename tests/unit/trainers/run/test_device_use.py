"""The use of a worker's device is sampled beside the training, and a device that cannot be sampled disturbs nothing."""

from __future__ import annotations

import logging
import time

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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    for name, value in {"mem_get_info": (20 << 30, 80 << 30), "utilization": 93, "power_draw": 650_000}.items():
        assert callable(getattr(torch.cuda, name)), "torch has renamed it"
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(device_use, "name_of", lambda device: "NVIDIA H100")
    return torch.device("cuda", 0)


def test_a_gpu_is_asked_for_its_own_use(gpu: torch.device):
    sent: list[DeviceSampled] = []
    sampler(sent, gpu)()
    use, numbers = sent[0].use, sent[0].numbers
    assert (use.device, use.gpu, use.use, use.memory, use.total) == ("NVIDIA H100", True, 0.93, 60 << 30, 80 << 30)
    assert numbers["gpu_0_power_usage_watts"] == 650
    assert numbers["gpu_0_memory_usage_percentage"] == 75
    assert numbers["gpu_0_utilization_percentage"] == 93


def test_a_part_of_a_gpu_does_not_say_how_busy_it_is_and_the_rest_is_sampled(gpu, monkeypatch, caplog):
    def unsupported(device: torch.device) -> None:
        raise RuntimeError("NVML: not supported")

    monkeypatch.setattr(torch.cuda, "utilization", unsupported)
    sent: list[DeviceSampled] = []
    sample = sampler(sent, gpu)
    with caplog.at_level(logging.WARNING):
        sample()
        sample()
    assert [record.getMessage() for record in caplog.records] == [
        "the use of the GPU of worker 3 cannot be sampled: NVML: not supported"
    ]
    assert [one.use.use for one in sent] == [None, None]
    assert "gpu_0_utilization_percentage" not in sent[0].numbers
    assert "cpu_utilization_percentage" in sent[0].numbers


def test_a_driver_that_does_not_answer_disturbs_nothing(gpu, monkeypatch, caplog):
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    sent: list[DeviceSampled] = []
    sample = sampler(sent, gpu)
    with caplog.at_level(logging.WARNING):
        sample()
        sample()
    assert [record.getMessage() for record in caplog.records] == [
        "the device of worker 3 cannot be sampled: CUDA error: unknown error"
    ]
    assert sent == []
