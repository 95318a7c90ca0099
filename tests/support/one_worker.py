"""A whole run of one worker in this process, without Ray: what it reports to, its images, and what it does without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glann.cluster.checkpoints import lease
from glann.cluster.latents import LatentTable
from glann.config.run import Config
from glann.datasets.pack import pack
from glann.metrics.features.extractor import EXTRACTORS, ExtractorSpec
from glann.reports.run_folder import write_config
from glann.trainers.run.control import Request
from glann.trainers.run.events import Resumed
from glann.trainers.run.worker import Worker
from torch import nn


class Driver:
    """What a worker reports to, in place of the driver's mailbox; `at` is called with every event."""

    def __init__(self, at: Callable[[Any], None] = lambda event: None) -> None:
        self.events: list[Any] = []
        self.phases: list[str] = []
        self.request, self.at = Request.NOTHING, at

    def send(self, event: Any) -> None:
        self.events.append(copy.deepcopy(event) if isinstance(event, Resumed) else event)  # its position moves on
        self.at(event)

    def post(self, event: Any) -> None:
        self.send(event)

    def progress(self, event: Any) -> None:
        self.at(event)

    def enter(self, phase: str) -> None:
        self.phases.append(phase)

    def requested(self) -> Request:
        return self.request

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def noise_images(folder: Path, rows: int) -> Path:
    """A packed data set of grey noise of 28 px."""
    np.savez(folder / "x.npz", images=np.random.default_rng(0).integers(0, 256, (rows, 28, 28, 1), np.uint8))
    pack(str(folder / "x.npz"), str(folder / "data"), resolution=28, channels=1)
    return folder / "data"


@contextmanager
def in_one_process(cache: Path) -> Iterator[None]:
    """The table of codes in this process, no lease, and features (`squeezenet`) that need no weights."""
    features = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten())
    made = ExtractorSpec("squeezenet-caffe", 147, lambda *_: features, lambda img: img[:, :1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GLANN_CACHE", str(cache))
        patched.setattr(LatentTable, "spawn", LatentTable.in_process)
        patched.setattr("glann.trainers.run.worker.require", lambda *_: None)
        patched.setitem(EXTRACTORS, "squeezenet", made)
        yield


def worker(config: Config, driver: Driver) -> Worker:
    """The worker of a run whose folder has been made."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config.run_dir, config)
    return Worker(config, driver, torch.device("cpu"), lease.Ticket(1, "a"))  # type: ignore[arg-type]
