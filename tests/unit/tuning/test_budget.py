"""The time budget of a study: counted over restarts, GPUs in use only, and which limit was reached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from glann.storage.journal import entries
from glann.tracking.runs import TrackedRun
from glann.tuning import budget as budgets
from glann.tuning.budget import RECORD_EVERY_S, Budget
from glann.tuning.ledger import Ledger
from glann.tuning.study import StudyConfig
from study_folder import make_study


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budgets, "monotonic", clock)
    return clock


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    return make_study(tmp_path, budget={"trials": 9, "hours": 1, "gpu_hours": 4})


def started(study: StudyConfig, gpus: float = 2.0, notify: Any = lambda: None) -> Budget:
    return Budget(study, Ledger(study.folder), TrackedRun(study.folder, None), gpus, notify)


def trials(running: int) -> list[Any]:
    return [SimpleNamespace(status="RUNNING")] * running + [SimpleNamespace(status="TERMINATED")] * 3


def passes(budget: Budget, clock: Clock, seconds: float, running: int = 0) -> None:
    """In steps, as Ray Tune takes them."""
    for _ in range(10):
        clock.now += seconds / 10
        budget.on_step_begin(0, trials(running))


def test_hours_pass_with_the_clock_and_gpu_hours_with_the_trials_that_run(study: StudyConfig, clock: Clock):
    budget = started(study)
    passes(budget, clock, 600, running=3)
    passes(budget, clock, 600, running=0)
    assert budget.seconds == pytest.approx(1200)
    assert budget.gpu_seconds == pytest.approx(600 * 3 * 2)
    assert not budget.spent()


@pytest.mark.parametrize(("running", "why"), [(1, "1 hours"), (3, "4 GPU-hours")])
def test_the_first_limit_that_is_reached_ends_it(study: StudyConfig, clock: Clock, running: int, why: str):
    budget = started(study)
    while not budget.spent():
        passes(budget, clock, 60, running)
        assert budget.seconds <= 3660
    assert budget.why() == why
    assert max(budget.seconds / 3600, budget.gpu_seconds / 4 / 3600) == pytest.approx(1, abs=0.02)


def test_without_limits_nothing_is_ever_spent(tmp_path: Path, clock: Clock):
    budget = started(make_study(tmp_path))
    passes(budget, clock, 1e9, running=50)
    assert budget.why() == ""


def test_the_clock_continues_over_restarts_but_not_between_them(study: StudyConfig, clock: Clock):
    first = started(study)
    passes(first, clock, 1200, running=1)
    clock.now += 1e6  # no command works on it
    second = started(study)
    assert second.seconds == pytest.approx(1200, abs=RECORD_EVERY_S)
    passes(second, clock, 1200, running=1)
    third = started(study)
    assert third.seconds == pytest.approx(2400, abs=2 * RECORD_EVERY_S)
    assert third.gpu_seconds == pytest.approx(4800, abs=4 * RECORD_EVERY_S)
    passes(third, clock, 1300)
    assert third.why() == "1 hours"
    assert started(study).spent()  # also before its first step


def test_a_kill_forgets_at_most_what_passed_since_the_last_entry(study: StudyConfig, clock: Clock):
    budget = started(study)
    for _ in range(500):
        clock.now += 0.7
        budget.on_step_begin(0, trials(1))
        assert budget.seconds - started(study).seconds <= RECORD_EVERY_S + 0.7


def test_the_journal_says_what_the_study_has_come_to(study: StudyConfig, clock: Clock):
    calls: list[int] = []
    budget = started(study, notify=lambda: calls.append(1))
    budget.on_step_begin(0, trials(1))
    ledger = budget.ledger
    ledger.end(ledger.start({}), state="finished", value=0.4)
    passes(budget, clock, 1, running=1)
    ledger.end(ledger.start({"sampler.noise_dim": 9}), state="finished", value=0.3)
    passes(budget, clock, 1, running=1)
    passes(budget, clock, 1, running=1)  # no news
    lines = [entry for entry in entries(study.folder / "metrics.jsonl") if entry["stage"] == "study"]
    assert [line["ended"] for line in lines] == [0, 1, 2]
    assert [line.get("best_fd_squeezenet") for line in lines] == [None, 0.4, 0.3]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert len(calls) == 3
    assert started(study).entry == 3  # numbers continue, so that nothing is taken for a repetition


def test_the_best_value_of_another_sampler_is_kept_under_its_name(tmp_path: Path, clock: Clock):
    budget = started(make_study(tmp_path, metric="fd_squeezenet_glo"))
    budget.ledger.end(budget.ledger.start({}), state="finished", value=0.4)
    budget.on_step_begin(0, trials(1))
    assert entries(budget.study.folder / "metrics.jsonl")[-1]["gaussian/best_fd_squeezenet"] == 0.4
