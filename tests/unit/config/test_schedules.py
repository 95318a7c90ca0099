"""Learning-rate factors: the paper's halving, cosine and warm-up."""

import pytest
from glann.config.schedule import ScheduleConfig


def test_halving_is_constant_within_its_epochs():
    schedule = ScheduleConfig(kind="halving", every=50)
    assert [schedule.factor(epoch, 500) for epoch in (0, 49.9, 50, 99, 100)] == [1, 1, 0.5, 0.5, 0.25]


def test_cosine_starts_at_one_and_ends_at_its_floor():
    schedule = ScheduleConfig(kind="cosine", floor=0.1)
    assert schedule.factor(0, 10) == pytest.approx(1)
    assert schedule.factor(5, 10) == pytest.approx(0.55)
    assert schedule.factor(10, 10) == pytest.approx(0.1)


def test_warm_up_rises_linearly_and_delays_the_cosine():
    schedule = ScheduleConfig(kind="cosine", warmup=2)
    assert schedule.factor(0, 12) == 0
    assert schedule.factor(1, 12) == pytest.approx(0.5)
    assert schedule.factor(2, 12) == pytest.approx(1)
    assert schedule.factor(7, 12) == pytest.approx(0.5)


def test_constant_stays():
    assert ScheduleConfig().factor(99.5, 100) == 1
