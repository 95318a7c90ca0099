"""A thousand workers and one mailbox: what they repeat is bounded together, and the driver keeps up with it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from glann.config.run import load
from glann.reports.status import DeviceUse
from glann.trainers.plan.evaluation import EvaluationCost
from glann.trainers.plan.remaining import Remaining, Work
from glann.trainers.run import events, mailbox
from glann.trainers.run.control import Request
from glann.trainers.run.mailbox import MESSAGES_PER_S, Mailbox, Reporter, interval
from glann.trainers.run.telemetry import Telemetry

WORLD = 1000


def actor(box: Mailbox):
    """The mailbox as its handle; answers are not waited for."""
    return SimpleNamespace(send=SimpleNamespace(remote=lambda message: box.send(message)))


@pytest.mark.parametrize(("workers", "per_s"), [(1, 2), (7, 14), (WORLD, MESSAGES_PER_S)])
def test_progress_of_the_evaluation_is_bounded_over_all_workers(workers, per_s, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(mailbox, "monotonic", lambda: now[0])
    box = Mailbox()
    reporters = [Reporter(actor(box), rank, 0, workers) for rank in range(workers)]
    seconds = 64
    for tick in range(4 * seconds):  # each worker finishes a batch four times a second
        now[0] = 100.0 + tick / 4
        for reporter in reporters:
            reporter.progress(events.Evaluating(reporter.rank, tick, 4 * seconds))
    received = box.drain(Request.NOTHING)
    assert len({message.event.rank for message in received}) == workers  # each is heard of
    assert len(received) <= per_s * seconds + workers


def test_the_training_is_reported_by_one_worker_as_often_as_ever(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(mailbox, "monotonic", lambda: now[0])
    box = Mailbox()
    reporter = Reporter(actor(box), 0, 0, WORLD)
    for step in range(100):
        now[0] += 0.05
        reporter.progress(events.Progress("glo", 0, step, 100, 1.0, {}))
    assert len(box.drain(Request.NOTHING)) == 10


def test_devices_are_sampled_less_often_by_many():
    assert interval(10.0, 8) == 10.0
    assert interval(10.0, WORLD) == pytest.approx(31.25)


def test_the_driver_takes_a_minute_of_a_thousand_workers_in_seconds():
    config = load("digits", ["cluster.workers=1000", "glo.batch_size=1000"])
    remaining = Remaining(config, Work({"glo": 1e13, "imle": 5e12}, 1e10, EvaluationCost(300, 0, 1e12, 10, 0)))
    telemetry = Telemetry(config, remaining)
    telemetry(events.Training(WORLD, None))
    for rank in range(WORLD):
        telemetry(events.Joined(f"node-{rank // 8}"))
    began = time.process_time()
    for minute in range(2):  # 31 s apart
        for rank in range(WORLD):
            use = DeviceUse(rank=rank, node=f"n{rank // 8}", device="H100", gpu=True, use=0.5, memory=1, total=2)
            telemetry(events.DeviceSampled(use, {}))
            telemetry(events.Evaluating(rank, minute * 10, 20))
        status = telemetry.status()
    seconds = time.process_time() - began
    print(f"{seconds:.2f} s for {4 * WORLD} messages")
    assert len(status.devices) == WORLD
    assert status.images == (10 * WORLD, 20 * WORLD)
    assert seconds < 10
