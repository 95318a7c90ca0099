"""Protects what a plan says of measurements while a run trains: their number, and the share of time that they take."""

from __future__ import annotations

import io

import pytest
from glann.config.run import load
from glann.trainers.plan.costs import training_costs
from glann.trainers.plan.estimate import make_plan
from glann.trainers.plan.evaluation import interim_cost
from rich.console import Console


def test_a_plan_counts_the_pauses_of_a_run():
    """celebahq-1024 has 250 epochs and 50: samples and reconstructions 25 times, and samples alone 5 times."""
    plan = make_plan(load("celebahq-1024", ["sampler.kind=imle", "sampler.epochs=50", "evaluation.every_epochs=10"]))
    assert (plan.interim.measurements, plan.interim.images) == (30, 25 * 2000 + 5 * 1000)
    plain = make_plan(load("celebahq-1024", ["sampler.kind=imle", "sampler.epochs=50"]))
    assert plain.interim.measurements == 0
    for measured, unmeasured in zip(plan.estimates, plain.estimates, strict=True):
        assert measured.hours == pytest.approx(unmeasured.hours + measured.interim)
        assert 0 < measured.interim < 0.01 * measured.hours
    console = Console(file=io.StringIO(), width=500)
    console.print(plan)
    text = console.file.getvalue()
    assert "while it trains 30 measurements, 55,000 images drawn" in text
    assert "of measuring while it trains" in text


def test_the_last_epoch_of_a_stage_is_always_measured():
    for epochs, every, times in ((12, 4, 3), (12, 5, 3), (12, 20, 1)):
        config = load("digits", [f"glo.epochs={epochs}", "sampler.kind=gaussian", f"evaluation.every_epochs={every}"])
        generator, _ = training_costs(config)
        assert interim_cost(config, 100, generator).measurements == times + 1
