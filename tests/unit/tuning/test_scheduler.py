"""Early stopping continues where it was: rungs rebuilt from journals decide as those that saw the results live."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from glann.cluster.checkpoints.best import Best
from glann.storage.journal import Journal
from glann.trainers.run.events import EpochDone, Measured
from glann.tuning.ledger import Trial
from glann.tuning.scheduler import EPOCH, LOSS, build_scheduler, compared, last_score, losses, within
from glann.tuning.search import member
from glann.tuning.study import StudyConfig
from glann.tuning.trial import TrialRun
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from study_folder import make_study

EPOCHS, GRACE, REDUCTION = 12, 1, 2.5
CONTROLLER: Any = SimpleNamespace(search_alg=None)


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    return make_study(tmp_path, scheduler={"grace": GRACE, "reduction": REDUCTION})


def known(number: int, trial_id: str) -> Any:
    """A trial as Ray's schedulers see it."""
    return SimpleNamespace(trial_id=trial_id, config={"member": member(Trial(number, {}))})


class Training:
    """Trials whose results go to an independent scheduler, which sees every result once, and to a study's journals."""

    def __init__(self, study: StudyConfig, seed: int) -> None:
        self.study, self.rng = study, random.Random(seed)
        self.epochs: dict[int, int] = {}  # that each has done
        self.active: set[int] = set()
        self.ledger: list[Trial] = [Trial(0, {}, "finished")]
        self.results: dict[tuple[int, int], float] = {}
        self.reference = ASHAScheduler(
            time_attr=EPOCH,
            metric=LOSS,
            mode="min",
            grace_period=GRACE,
            reduction_factor=REDUCTION,
            max_t=EPOCHS,
            stop_last_trials=False,
        )

    def begin(self) -> int:
        number = len(self.ledger)
        self.ledger.append(Trial(number, {}))
        self.epochs[number] = 0
        self.active.add(number)
        self.reference.on_trial_add(CONTROLLER, known(number, f"live-{number}"))
        return number

    def advance(self) -> tuple[int, dict[str, Any], str]:
        """An epoch of one of those that run, its result, and what the reference makes of it."""
        number = self.rng.choice(sorted(self.active))
        self.epochs[number] += 1
        result = {EPOCH: self.epochs[number], LOSS: self.rng.random()}
        journal = Journal(self.study.run_dir(number) / "metrics.jsonl")
        journal.append({"stage": "glo", "epoch": result[EPOCH], "step": 10 * result[EPOCH], "loss": result[LOSS]})
        journal.close()
        decision = self.reference.on_trial_result(CONTROLLER, known(number, f"live-{number}"), result)
        if decision == "STOP" or result[EPOCH] == EPOCHS:
            self.active.remove(number)
            self.ledger[number] = Trial(number, {}, "stopped" if decision == "STOP" else "finished")
        return number, result, decision


@pytest.mark.parametrize("seed", range(6))
def test_rungs_rebuilt_from_journals_decide_as_those_that_saw_it_live(study: StudyConfig, seed: int):
    training = Training(study, seed)
    for _ in range(6):
        training.begin()
    for _ in range(25):
        training.advance()
        if len(training.active) < 3:
            training.begin()
    rebuilt = build_scheduler(study, training.ledger)
    for number in sorted(training.active):
        rebuilt.on_trial_add(CONTROLLER, known(number, f"again-{number}"))
    repeated = max(training.active, key=lambda number: training.epochs[number])  # from its last checkpoint
    for epoch, loss in list(losses(study.run_dir(repeated), "glo"))[-2:]:
        again = rebuilt.on_trial_result(CONTROLLER, known(repeated, f"again-{repeated}"), {EPOCH: epoch, LOSS: loss})
        assert again == "CONTINUE"
    decisions = []
    for _ in range(60):
        number, result, expected = training.advance()
        decision = rebuilt.on_trial_result(CONTROLLER, known(number, f"again-{number}"), result)
        assert decision == expected, f"trial {number}, {result}"
        decisions.append(decision)
        if len(training.active) < 3:
            number = training.begin()
            rebuilt.on_trial_add(CONTROLLER, known(number, f"again-{number}"))
    assert {"STOP", "CONTINUE"} == set(decisions)


def test_a_trial_is_taken_off_the_rungs_by_its_number(study: StudyConfig):
    rungs = build_scheduler(study, [])
    rungs.on_trial_add(CONTROLLER, known(1, "a"))
    rungs.on_trial_complete(CONTROLLER, known(1, "b"), {EPOCH: 1, LOSS: 0.5})
    rungs.on_trial_add(CONTROLLER, known(2, "a"))
    rungs.on_trial_remove(CONTROLLER, known(2, "b"))
    with pytest.raises(KeyError):
        rungs.on_trial_remove(CONTROLLER, known(2, "b"))


@pytest.mark.parametrize("loss", [1e-9, 1e9])
def test_the_base_recipe_sets_no_rung_and_is_never_stopped(study: StudyConfig, loss: float):
    journal = Journal(study.run_dir(0) / "metrics.jsonl")
    for epoch in range(1, EPOCHS + 1):
        journal.append({"stage": "glo", "epoch": epoch, "step": epoch, "loss": loss})
    journal.close()
    rungs = build_scheduler(study, [Trial(0, {}, "finished")])
    base = known(0, "base")
    rungs.on_trial_add(CONTROLLER, base)
    for number, worse in ((1, 0.5), (2, 0.4)):
        rungs.on_trial_add(CONTROLLER, known(number, str(number)))
        assert rungs.on_trial_result(CONTROLLER, known(number, str(number)), {EPOCH: 1, LOSS: worse}) == "CONTINUE"
    for epoch in range(1, EPOCHS + 1):
        assert rungs.on_trial_result(CONTROLLER, base, {"reached_epoch": epoch, "reached_loss": 1e9}) == "CONTINUE"


def measured(stage: str, epoch: int, value: float | None, better: str = "lower") -> Measured:
    found = None
    if value is not None:
        held = {"metric": "fd_squeezenet", "better": better, "value": value, "sampler": "gaussian", "samples": 100}
        found = Best.model_validate({"step": 10 * epoch, "stage": stage, "epoch": epoch, **held})
    return Measured(stage, epoch, 10 * epoch, {}, found, found, 1.0)


@pytest.mark.parametrize(("better", "sign"), [("lower", 1), ("higher", -1)])
def test_by_their_scores_trials_report_what_stage_one_measured(monkeypatch: pytest.MonkeyPatch, better: str, sign: int):
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(TrialRun, "report", lambda self, result: reports.append(result))
    trial: Any = object.__new__(TrialRun)  # without Ray, and without a run
    trial.number, trial.reached, trial.first_stage, trial.by_score = 1, {}, "glo", True
    for epoch, value in ((2, 7.0), (4, None), (6, 5.0)):
        trial.notify(EpochDone("glo", epoch, 10 * epoch, {"loss": 0.5, "seconds": 1.0}))
        trial.notify(measured("glo", epoch, value, better))
    trial.notify(measured("imle", 2, 3.0, better))
    assert reports == [{EPOCH: 2, LOSS: sign * 7.0}, {EPOCH: 6, LOSS: sign * 5.0}]


@pytest.mark.parametrize(("best", "sign"), [("fd_squeezenet", 1), ("recall_squeezenet", -1)])
def test_scores_of_earlier_starts_are_replayed(tmp_path: Path, best: str, sign: int):
    overrides = {"evaluation.every_epochs": 2, "evaluation.best": best, "evaluation.extractor": "squeezenet"}
    study = make_study(tmp_path, scheduler={"by": "score"}, overrides=overrides)
    journal = Journal(study.run_dir(1) / "metrics.jsonl")
    for epoch in (1, 2):
        journal.append({"stage": "glo", "epoch": epoch, "step": 10 * epoch, "loss": 0.5})
    journal.append(
        {"stage": "glo/measured", "epoch": 2, "step": 20, f"gaussian/{best}": 7.0, "reconstruction/fd_squeezenet": 1.0}
    )
    journal.append({"stage": "imle/measured", "epoch": 2, "step": 30, best: 3.0})
    journal.close()
    assert last_score(study, study.run_dir(2)) == ""
    assert last_score(study, study.run_dir(1)) == f"after epoch 2, gaussian/{best} 7"
    assert list(compared(study, study.run_dir(1))) == [(2, sign * 7.0)]
    assert list(losses(study.run_dir(1), "glo")) == [(1, 0.5), (2, 0.5)]


@pytest.mark.parametrize(("number", "compared"), [(0, {}), (1, {EPOCH: 3, LOSS: 0.5})])
def test_the_base_recipe_gives_no_loss_to_be_compared_by(
    monkeypatch: pytest.MonkeyPatch, number: int, compared: dict[str, Any]
):
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(TrialRun, "report", lambda self, result: reports.append(result))
    trial: Any = object.__new__(TrialRun)  # without Ray, and without a run
    trial.number, trial.reached, trial.first_stage, trial.by_score = number, {}, "glo", False
    trial.notify(EpochDone("glo", 3, 30, {"loss": 0.5, "seconds": 1.0}))
    trial.notify(EpochDone("imle", 1, 31, {"loss": 0.1, "seconds": 1.0}))  # of another stage
    trial.notify(measured("glo", 3, 7.0))
    assert reports == [compared]
    assert trial.reached["reached_loss"] == 0.5  # the board and the ledger know it


def test_trials_are_compared_by_stage_one_alone(study: StudyConfig):
    journal = Journal(study.run_dir(1) / "metrics.jsonl")
    journal.append({"stage": "run", "event": "started"})
    journal.append({"stage": "glo", "epoch": 1, "step": 10, "loss": 0.5})
    journal.append({"stage": "glo", "epoch": 2, "step": 20, "loss": float("nan")})
    journal.append({"stage": "imle", "epoch": 1, "step": 30, "loss": 0.1})
    journal.close()
    assert list(losses(study.run_dir(1), "glo")) == [(1, 0.5)]
    assert list(losses(study.run_dir(2), "glo")) == []


@pytest.mark.parametrize(
    "changes",
    [{"scheduler": {"kind": "none"}}, {"space": {"sampler.noise_dim": {"integer": [8, 32]}}}],
    ids=["none", "stage 2 alone"],
)
def test_nothing_is_stopped_where_nothing_can_be_compared(tmp_path: Path, changes: dict[str, Any]):
    assert type(build_scheduler(make_study(tmp_path, **changes), [])) is FIFOScheduler


def test_a_grace_longer_than_the_run_stops_nothing(tmp_path: Path):
    study = make_study(tmp_path, scheduler={"grace": 500})
    rungs = build_scheduler(study, [])
    for number in range(1, 5):
        rungs.on_trial_add(CONTROLLER, known(number, str(number)))
        for epoch in range(1, EPOCHS + 1):
            result = {EPOCH: epoch, LOSS: float(number)}
            assert rungs.on_trial_result(CONTROLLER, known(number, str(number)), result) == "CONTINUE"


RATES = {"glo.latent_lr": {"log_uniform": [0.005, 0.1]}, "sampler.lr": {"choice": [0.001, 0.003]}}


def test_a_population_takes_members_with_values_of_their_own(tmp_path: Path):
    study = make_study(tmp_path, space=RATES, search={"kind": "population"})
    scheduler = build_scheduler(study, [])
    assert isinstance(scheduler, PopulationBasedTraining)
    params = {"glo.latent_lr": 0.02, "sampler.lr": 0.003}
    given = RayTrial("trial", stub=True, config={"member": {"number": 1, "params": dict(params)}})
    scheduler.on_trial_add(CONTROLLER, given)
    assert given.config == {"member": {"number": 1, "params": params}}  # nothing is sampled over the ledger's values


@given(st.floats(1e-6, 10))
def test_a_population_stays_inside_the_space(tmp_path_factory: pytest.TempPathFactory, rate: float):
    study = make_study(tmp_path_factory.mktemp("studies"), space=RATES, search={"kind": "population"})
    config = {"member": {"number": 1, "params": {"glo.latent_lr": rate, "sampler.lr": 0.003}}}
    params = within(study, config)["member"]["params"]
    assert params == {"glo.latent_lr": min(max(rate, 0.005), 0.1), "sampler.lr": 0.003}
