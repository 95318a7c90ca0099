"""One record says how a run stands, and its time left is that of the whole run: every stage and the evaluation."""

from __future__ import annotations

import math

import pytest
from glann.cluster.checkpoints.best import Best
from glann.config.run import load
from glann.errors import EnvironmentFault, UserError
from glann.reports.status import DeviceUse, scores_in_words
from glann.trainers.plan.evaluation import EvaluationCost
from glann.trainers.plan.remaining import Remaining, Work
from glann.trainers.run import events
from glann.trainers.run.recovery import RunStopped
from glann.trainers.run.telemetry import Telemetry

PER_IMAGE = 1e10
# 10 epochs of 100 images; a second stage of half of that; an evaluation that computes a tenth and reads nothing
WORK = Work({"glo": 1e13, "imle": 5e12}, PER_IMAGE, EvaluationCost(300, 0, 1e12, 10, 0))
CONFIG = load("digits", ["glo.epochs=10", "sampler.kind=imle", "sampler.epochs=5", "cluster.workers=2"])


class Run:
    """The telemetry of a run whose clock is set by hand."""

    def __init__(self, images_per_s: float | None = None, config=CONFIG, work: Work = WORK) -> None:
        self.time = 1000.0
        self.remaining = Remaining(config, work, clock=lambda: self.time)
        self.remaining.images_per_s = images_per_s
        self.telemetry = Telemetry(config, self.remaining, "http://mlflow/#/run", clock=lambda: self.time)
        self.telemetry(events.Training(2, None))

    def step(self, stage: str, epoch: int, step: int = 0, rate: float | None = None, seconds: float = 0.0) -> None:
        self.time += seconds
        speed = {} if rate is None else {"images_per_s": rate, "mfu": 0.25}
        self.telemetry(events.Progress(stage, epoch, step, 10, 0.5, speed))

    @property
    def left_s(self) -> float | None:
        return self.telemetry.status().left_s


def test_the_time_left_covers_both_stages_and_the_evaluation():
    run = Run()
    assert run.left_s is None, "nothing was measured"
    run.step("glo", 0, 1, rate=10.0)
    run.step("glo", 4, 1, rate=10.0, seconds=40.0)
    # 10 images/s: 59 s of stage 1 at its pace, half of 100 s, a tenth
    assert run.left_s == pytest.approx(59 + 50 + 10)


def test_a_later_stage_has_its_own_pace():
    """Operations say little about the seconds of a stage that is bound by something else."""
    run = Run(images_per_s=10.0)
    run.step("imle", 0)
    run.step("imle", 1, seconds=100.0)
    assert run.left_s == pytest.approx(4 * 100 + 10)


def test_an_evaluation_counts_the_images_of_all_workers():
    run = Run(images_per_s=10.0)
    run.telemetry(events.Evaluating(0, 10, 150))
    run.time += 20
    run.telemetry(events.Evaluating(0, 20, 150))
    run.telemetry(events.Evaluating(1, 10, 150))
    status = run.telemetry.status()
    assert (status.stage, status.images, status.epoch, status.loss) == ("evaluation", (30, 300), None, None)
    assert status.left_s == pytest.approx(20 / 20 * 270)


def test_an_evaluation_is_in_float32_whatever_the_training_is_in():
    config = load("celebahq-1024", ["data.url=/x"])
    run = Run(images_per_s=1e6, config=config)
    run.telemetry(events.DeviceSampled(DeviceUse(rank=0, node="a", device="H100 SXM", gpu=True, memory=1, total=2), {}))
    assert run.remaining.of_evaluation() == pytest.approx(1e12 / (2 * 0.3 * 67e12))


def test_the_evaluation_of_a_run_with_small_networks_is_not_as_slow_as_its_training():
    """These train with a fraction of what a core can compute, but judges are large and get large batches."""
    run = Run(images_per_s=0.01)
    assert run.remaining.of_evaluation() == pytest.approx(1e12 / (2 * 2e10))


def test_time_passes_between_two_events():
    run = Run(images_per_s=10.0)
    run.step("glo", 0, 0)
    run.step("glo", 1, 0, seconds=10.0)
    before = run.left_s
    run.time += 7
    assert before is not None
    assert run.left_s == pytest.approx(before - 7)


def test_a_new_group_of_workers_starts_a_pace_of_its_own():
    run = Run()
    run.step("glo", 0, 0, rate=10.0)
    run.step("glo", 2, 0, rate=10.0, seconds=20.0)
    run.telemetry(events.WorkersLost("a node was lost"))
    lost = run.telemetry.status()
    assert (lost.state, lost.left_s, lost.loss, lost.workers) == ("starting", None, None, None)
    assert lost.message == "a node was lost"
    run.time += 600
    run.telemetry(events.Training(1, None, "a node was lost", 600.0))
    run.step("glo", 1, 0, rate=5.0)
    run.step("glo", 2, 0, rate=5.0, seconds=20.0)
    assert run.left_s == pytest.approx(8 * 20 + 100 + 20), "not slower for the ten minutes without workers"


def test_the_record_has_what_a_user_asks_for():
    run = Run()
    run.telemetry(events.CheckpointSaved(7))
    run.telemetry(events.DeviceSampled(DeviceUse(rank=1, node="b", device="H100", gpu=True, memory=1, total=2), {}))
    run.telemetry(events.DeviceSampled(DeviceUse(rank=0, node="a", device="H100", gpu=True, memory=1, total=2), {}))
    run.step("glo", 3, 5, rate=10.0, seconds=9.0)
    status = run.telemetry.status()
    assert (status.state, status.stage, status.epoch, status.epochs) == ("running", "stage 1 (GLO)", 4, 10)
    assert (status.done, status.loss, status.images_per_s, status.mfu) == (0.35, 0.5, 10.0, 0.25)
    assert (status.checkpoint_step, status.checkpoint_at, status.updated) == (7, 1000.0, 1009.0)
    assert [device.rank for device in status.devices] == [0, 1]
    assert status.mlflow == "http://mlflow/#/run"


def test_numbers_of_one_stage_are_not_shown_for_another():
    run = Run()
    run.step("glo", 9, 9, rate=10.0)
    run.step("imle", 0, 0)
    status = run.telemetry.status()
    assert (status.stage, status.images_per_s, status.mfu) == ("stage 2 (IMLE)", None, None)


def test_a_loss_that_is_not_finite_can_be_written():
    run = Run()
    run.telemetry(events.EpochDone("glo", 1, 1, {"loss": math.inf, "seconds": 1.0}))
    assert '"loss":null' in run.telemetry.status().model_dump_json()


@pytest.mark.parametrize(
    ("error", "state", "status"),
    [
        (None, "finished", 0),
        (RunStopped("the run was stopped and is saved"), "stopped", 75),
        (KeyboardInterrupt(), "stopped", 130),
        (EnvironmentFault("s3://user:secret@host is gone"), "failed", 1),
        (UserError("wrong"), "failed", 2),
        (AttributeError("a bug"), "failed", 70),
    ],
)
def test_the_end_is_named(error: BaseException | None, state: str, status: int):
    run = Run()
    run.step("glo", 0, 1, rate=10.0)
    run.telemetry.end(error)
    ended = run.telemetry.status()
    assert (ended.state, ended.exit_status, ended.left_s) == (state, status, None)
    assert "secret" not in ended.model_dump_json()


def test_a_stop_is_not_forgotten_when_workers_start_meanwhile():
    run = Run()
    run.telemetry(events.Stopping())
    run.telemetry(events.Training(2, None))
    assert run.telemetry.status().state == "stopping"


def test_the_last_score_and_the_best_are_shown_and_the_best_outlives_a_restart():
    held = {"metric": "fd_squeezenet", "better": "lower", "sampler": "gaussian", "samples": 100, "stage": "glo"}
    best, last = (Best(step=step, value=value, epoch=step, **held) for step, value in ((4, 1.5), (8, 2.5)))
    run = Run()
    assert scores_in_words(run.telemetry.status()) == ""
    run.telemetry(events.Measured("glo", 8, 8, {}, last, best, 1.0))
    assert scores_in_words(run.telemetry.status()) == "fd_squeezenet 2.5, best 1.5 at step 4"
    again = Telemetry(CONFIG, run.remaining, best=best)
    assert scores_in_words(again.status()) == "best fd_squeezenet 1.5 at step 4"
