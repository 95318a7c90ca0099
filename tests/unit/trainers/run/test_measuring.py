"""Measurements while a run trains: what they find, which checkpoint they keep, and that they change nothing else.

A whole run of one worker, in this process and without Ray.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from glann.cluster.checkpoints.best import find_step, named_best, usable_best
from glann.cluster.checkpoints.layout import DamagedCheckpoint, folder_name, survey
from glann.cluster.checkpoints.reader import load_rows
from glann.config.run import Config
from glann.errors import UserError
from glann.inference.package import load_model
from glann.metrics.result import Result
from glann.metrics.spec import best_metric
from glann.storage.open import open_store
from glann.trainers.run import measuring
from glann.trainers.run.control import Request
from glann.trainers.run.evaluation import Evaluated
from glann.trainers.run.events import Measured, Resumed, Warned
from glann.trainers.run.folder import differences
from glann.trainers.run.measuring import Interim
from glann.trainers.run.packaging import export_saved, open_checkpoint
from glann.trainers.run.state import load_any
from glann.trainers.run.worker import Stopped
from one_worker import Driver, in_one_process, noise_images, worker

ROWS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("images"), ROWS)


@pytest.fixture(scope="module", autouse=True)
def in_process(tmp_path_factory):
    with in_one_process(tmp_path_factory.mktemp("cache")):
        yield


def configured(data: Path, home: Path, name: str = "run", **sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "data": {"url": str(data), "resolution": 28, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": 4, "width": 4},
        "loss": {"kind": "l1"},
        "engine": {"kind": "torch"},
        "glo": {"epochs": 5, "batch_size": 20, "ema": 0.9},
        "sampler": {"kind": "imle", "epochs": 3, "noise_dim": 3, "hidden_dim": 8},
        "evaluation": {"samples": 20, "interim_samples": 16, "every_epochs": 2},
        "checkpoint": {"keep": 1},
        "tracking": {"enabled": False},
    }
    for section, keys in sections.items():
        tree[section] = tree.get(section, {}) | keys
    return Config.model_validate({"name": name, "runs_dir": str(home), **tree})


def train(config: Config, driver: Driver | None = None, evaluate: bool = False) -> Driver:
    """The driver after all stages, and the evaluation."""
    driver = driver or Driver()
    made = worker(config, driver)
    if not evaluate:
        made.evaluate = lambda: None  # type: ignore[method-assign]
    made.run()
    return driver


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> tuple[Config, Driver]:
    """An undisturbed run that has kept all its checkpoints."""
    config = configured(data, tmp_path_factory.mktemp("runs"), "whole", checkpoint={"keep": 99})
    return config, train(config, evaluate=True)


def scored_as(monkeypatch, values: dict[tuple[str, int], float]) -> None:
    """Let the measurements after these epochs find these values."""
    honest = Interim.best_of

    def best_of(self: Interim, results: Any, stage: str, epoch: int, step: int) -> Any:
        found = honest(self, results, stage, epoch, step)
        return found and found.model_copy(update={"value": values[stage, epoch]})

    monkeypatch.setattr(Interim, "best_of", best_of)


def final_state(config: Config) -> dict[str, torch.Tensor]:
    store = open_store(config.checkpoint_url)
    step = find_step(store, "last")
    _, saved = load_any(store, step)
    tensors = {
        f"{network}.{group}.{name}": tensor
        for network, state in saved.networks.items()
        for group, held in state.items()
        if isinstance(held, dict)
        for name, tensor in held.items()
    }
    rows = load_rows(store, step, range(ROWS))
    return tensors | {name: torch.from_numpy(array) for name, array in rows.items()}


WORSE = {("glo", 2): 5.0, ("glo", 4): 1.0, ("glo", 5): 2.0, ("imle", 2): 3.0, ("imle", 3): 9.0}


def test_what_is_measured_and_when(whole):
    """Every second epoch of a stage and its last: in stage 1 by a Gaussian over the codes, then by the sampler."""
    config, driver = whole
    found = driver.of(Measured)
    assert [(one.stage, one.epoch) for one in found] == list(WORSE)
    for one in found:
        drawn = "gaussian/" if one.stage == "glo" else ""
        names = {f"{drawn}{name}_squeezenet" for name in ("fd", "precision", "recall")}
        assert one.numbers.keys() == names | ({"reconstruction/fd_squeezenet"} if one.stage == "glo" else set())
        assert one.found.step == one.serial
        assert one.found.value == one.numbers[f"{drawn}fd_squeezenet"]
        assert one.best.value == min(other.found.value for other in found if other.serial <= one.serial)
    assert named_best(open_store(config.checkpoint_url)) == found[-1].best
    [evaluated] = driver.of(Evaluated)
    assert evaluated.step == found[-1].serial, "the last checkpoint is measured and packaged"


def test_the_best_is_kept_and_draws_the_images_of_its_step(data, tmp_path, monkeypatch, whole):
    """keep=1: the last and the best. The other run is the same, and has all. It is packaged from the best."""
    scored_as(monkeypatch, WORSE)
    config = configured(data, tmp_path, checkpoint={"keep": 1, "use": "best"})
    driver = train(config, evaluate=True)
    store, last = open_store(config.checkpoint_url), driver.of(Measured)[-1].serial
    best = usable_best(store)
    assert (best.stage, best.epoch, best.value, best.sampler) == ("glo", 4, 1.0, "gaussian")
    assert list(survey(store).good) == [best.step, last]
    drawn = {}
    for which, step, own in (("best", best.step, "gaussian"), ("last", last, "imle")):
        opened, other = open_checkpoint(config.run_dir, which), open_checkpoint(whole[0].run_dir, folder_name(step))
        assert (opened.step, opened.model.own) == (other.step, other.model.own) == (step, own)
        drawn[which] = opened.model.sample(5, seed=3)
        assert (drawn[which] == other.model.sample(5, seed=3)).all()
    assert (drawn["best"] != drawn["last"]).any()

    [evaluated] = driver.of(Evaluated)
    assert evaluated.step == best.step
    state, saved = load_any(store, best.step)
    export_saved(tmp_path / "model", config, saved, evaluated.gaussian, state["rows"], state["fingerprint"])
    assert (load_model(tmp_path / "model").sample(5, seed=3) == drawn["best"]).all()

    store.delete(next(key for key in store.list(folder_name(best.step)) if "latents" in key))
    for use in (lambda: train(config, evaluate=True), lambda: open_checkpoint(config.run_dir, "best")):
        with pytest.raises(DamagedCheckpoint, match=r"the best checkpoint .* is missing"):
            use()


def test_training_and_its_results_are_bit_for_bit_those_without_measurements(data, tmp_path, whole):
    saved = {"keep": 99, "every_epochs": 2}
    plain = configured(data, tmp_path, "plain", evaluation={"every_epochs": None}, checkpoint=saved)
    driver = train(plain, evaluate=True)
    assert not driver.of(Measured)
    assert same_state(plain, whole[0])
    assert driver.of(Evaluated)[0].results == whole[1].of(Evaluated)[0].results
    one, other = (open_checkpoint(config.run_dir, "6").model.sample(5).astype(int) for config in (plain, whole[0]))
    assert abs(one - other).max() <= 1, "one that was not measured gets the statistics of its averaged generator"


def same_state(one: Config, other: Config) -> bool:
    states = final_state(one), final_state(other)
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_a_loss_at_a_measurement_costs_the_measurement_alone(data, tmp_path, whole):
    """A worker dies as a checkpoint is to be written, and the next one while its samples are drawn. The end is the same
    to the bit, and so is everything that both measured.
    """
    config, seen = configured(data, tmp_path), []
    for moment, epoch in (("saving", 2), (measuring.SAMPLES, 4)):
        driver = Driver()
        driver.enter = dying(driver, moment, 2 if moment == "saving" else 1)
        with pytest.raises(RuntimeError, match="lost"):
            train(config, driver)
        wait_for_writer()
        seen += driver.of(Measured)
        assert max(survey(open_store(config.checkpoint_url)).good) == 3 * epoch
    again = train(config)
    assert [resumed.position.epoch for resumed in again.of(Resumed)] == [4]
    assert same_state(config, whole[0])
    undisturbed = {one.serial: one.numbers for one in whole[1].of(Measured)}
    seen += again.of(Measured)
    assert [one.serial for one in seen] == [serial for serial in undisturbed if serial != 12]
    assert all(one.numbers == undisturbed[one.serial] for one in seen)


def dying(driver: Driver, moment: str, times: int) -> Callable[[str], None]:
    def enter(phase: str) -> None:
        driver.phases.append(phase)
        if phase == moment and driver.phases.count(moment) == times:
            raise RuntimeError("lost")

    return enter


def wait_for_writer() -> None:
    """Until the thread of a killed worker has written its checkpoint; a thread of a killed process would be gone."""
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint-"):
            thread.join(20)


def test_who_stops_does_not_wait_for_a_measurement(data, tmp_path):
    """The request comes at the beginning of a measurement: it is given up, and the run is saved and stopped."""
    config, driver = configured(data, tmp_path), Driver()
    driver.enter = lambda phase: setattr(driver, "request", Request.STOP) if phase == measuring.SAMPLES else None
    with pytest.raises(Stopped):
        train(config, driver)
    assert not driver.of(Measured)
    again = train(config)
    assert [(one.stage, one.epoch) for one in again.of(Measured)] == list(WORSE)[1:]


def test_a_best_that_is_lost_is_reported_and_another_one_chosen(data, tmp_path, monkeypatch):
    scored_as(monkeypatch, WORSE | {("glo", 2): 0.5})
    config, driver = configured(data, tmp_path), Driver()

    def lose(event: Any) -> None:
        if isinstance(event, Measured) and event.epoch == 4:
            store = open_store(config.checkpoint_url)
            store.write(next(key for key in store.list(folder_name(event.best.step)) if "generator" in key), b"short")

    driver.at = lose
    train(config, driver)
    [warned] = [event.text for event in driver.of(Warned) if "best checkpoint" in event.text]
    assert "the best checkpoint (step-000006, fd_squeezenet 0.5 after epoch 2 of glo)" in warned
    assert "of its" in warned
    assert [one.best.epoch for one in driver.of(Measured)] == [2, 2, 5, 5, 5]
    assert usable_best(open_store(config.checkpoint_url)).value == 2.0


def test_an_interval_may_change_and_what_is_trained_is_not_measured_again(data, tmp_path, whole):
    rarer = configured(data, whole[0].run_dir.parent, "whole", evaluation={"every_epochs": 3}, checkpoint={"keep": 99})
    best = named_best(open_store(whole[0].checkpoint_url))
    assert not differences(whole[0], rarer)
    assert not train(rarer).of(Measured)
    assert named_best(open_store(rarer.checkpoint_url)) == best


def test_a_value_that_is_not_finite_is_no_best(whole):
    interim = Interim(whole[0], None, torch.device("cpu"))  # type: ignore[arg-type]
    for value in (math.nan, math.inf):
        assert interim.best_of([Result("fd_squeezenet", value, "gaussian")], "glo", 1, 3) is None


def test_checkpoints_are_those_of_runs(tmp_path):
    for source, message in (
        ("models:/faces@champion", "has no checkpoints; give the folder of its run"),
        (str(tmp_path / "nothing"), "is not a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_checkpoint(source, "best")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fid", "another extractor than evaluation.extractor=squeezenet"),
        ("fd_squeezene", "did you mean fd_squeezenet"),
        ("l1", "no metric of samples"),
        ("copying_squeezenet", "no metric of samples"),
        ("precision_codes", "no metric of samples"),
    ],
)
def test_a_metric_that_cannot_decide_is_refused(name, message):
    with pytest.raises(UserError, match=message) as refusal:
        best_metric("squeezenet", name)
    assert "\n" not in str(refusal.value)
    assert best_metric("squeezenet", None).name == "fd_squeezenet"
    assert best_metric("squeezenet", "recall_squeezenet").better == "higher"


def test_the_best_needs_measurements(data, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.use=best .* set evaluation\.every_epochs"):
        configured(data, tmp_path, checkpoint={"use": "best"}, evaluation={"every_epochs": None})
