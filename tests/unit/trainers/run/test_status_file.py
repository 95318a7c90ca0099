"""status.json lies beside the checkpoints while a run goes, and a store that fails or hangs does not disturb it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
from glann.config.run import Config, load
from glann.errors import EnvironmentFault
from glann.reports.status import FILE, read_status
from glann.storage.local import LocalStore
from glann.trainers.plan.evaluation import EvaluationCost
from glann.trainers.plan.remaining import Remaining, Work
from glann.trainers.run import events, heartbeat, status_file
from glann.trainers.run.recovery import RunStopped
from glann.trainers.run.telemetry import Telemetry

WORK = Work({"glo": 1e6, "imle": 5e5}, 1000, EvaluationCost(300, 0, 1e5, 10, 0))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load("digits", [f"runs_dir={tmp_path}", "name=night", "sampler.kind=imle"])


def telemetry(config: Config) -> Telemetry:
    return Telemetry(config, Remaining(config, WORK))


def wait_for(what, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_written_at_once_and_says_how_the_run_ended(config: Config):
    run, store = telemetry(config), LocalStore(config.run_dir)
    with status_file.status_file(config, run):
        wait_for(lambda: (config.run_dir / FILE).exists())
        status = read_status(store)
        assert status is not None
        assert (status.name, status.state) == ("night", "starting")
    ended = read_status(store)
    assert ended is not None
    assert ended.state == "finished"


@pytest.mark.parametrize("error", [RunStopped("stopped and saved"), EnvironmentFault("lost")])
def test_an_error_goes_on_its_way(config: Config, error: Exception):
    with pytest.raises(type(error)), status_file.status_file(config, telemetry(config)):
        raise error
    ended = read_status(LocalStore(config.run_dir))
    assert ended is not None
    assert ended.message == str(error)


def test_it_lies_beside_checkpoints_that_lie_elsewhere(config: Config, tmp_path: Path):
    elsewhere = load("digits", [f"runs_dir={tmp_path}", "name=night", f"checkpoint.url={tmp_path / 'shared'}"])
    with status_file.status_file(elsewhere, telemetry(elsewhere)):
        pass
    assert (tmp_path / "shared" / "night" / FILE).exists()
    assert not (elsewhere.run_dir / FILE).exists()


class Store(LocalStore):
    """A store that fails, or does not answer for as long as `held` is not set."""

    def __init__(self, root: Path, fails: bool = False) -> None:
        super().__init__(root)
        self.fails, self.held, self.asked = fails, threading.Event(), 0

    def write(self, key, data, *, only_if_absent=False):
        self.asked += 1
        if self.fails:
            raise EnvironmentFault("s3://faces does not answer")
        self.held.wait()


def test_a_store_that_does_not_answer_holds_up_neither_an_event_nor_the_end(config, monkeypatch, tmp_path: Path):
    store = Store(tmp_path)
    monkeypatch.setattr(status_file, "open_store", lambda url, s3: store)
    monkeypatch.setattr(heartbeat, "END_S", 0.2)
    run, began = telemetry(config), time.monotonic()
    with status_file.status_file(config, run) as file:
        wait_for(lambda: store.asked)
        asked = time.monotonic()
        for step in range(1000):
            event = events.Progress("glo", 0, step, 1000, 0.5, {"images_per_s": 10.0})
            run(event)
            file(event)
        assert time.monotonic() - asked < 1.0
    assert time.monotonic() - began < 5.0
    assert store.asked == 1
    store.held.set()


def test_a_store_that_fails_is_reported_once_and_tried_again(config, monkeypatch, tmp_path: Path, caplog):
    store = Store(tmp_path, fails=True)
    file = status_file.StatusFile(store, telemetry(config), lambda status: None)
    with caplog.at_level(logging.WARNING):
        file.write()
        file.write()
    assert store.asked == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/{FILE} cannot be written (s3://faces does not answer); training continues, and it is tried again"
    ]


def test_it_is_written_rarely_and_soon_after_a_change(config: Config, monkeypatch, tmp_path: Path):
    """A file of S3 every half a minute, whatever the number of steps; an end of an epoch is seen sooner."""
    clock, run = [100.0], telemetry(config)
    monkeypatch.setattr(status_file, "monotonic", lambda: clock[0])
    written: list[float] = []
    file = status_file.StatusFile(LocalStore(tmp_path), run, lambda status: written.append(clock[0]))

    def after(seconds: float, event: events.Event | None = None) -> None:
        clock[0] += seconds
        if event is not None:
            run(event)
            file(event)
        file.look()

    after(0, events.Progress("glo", 0, 1, 10, 0.5, {}))
    for _ in range(29):
        after(1, events.Progress("glo", 0, 1, 10, 0.5, {}))
    assert written == [100.0]
    after(1)
    assert written == [100.0, 130.0]
    after(1, events.EpochDone("glo", 1, 10, {"loss": 0.5, "seconds": 1.0}))
    after(1, events.EpochDone("glo", 2, 20, {"loss": 0.5, "seconds": 1.0}))
    assert written == [100.0, 130.0], "short epochs are not written one by one"
    after(3)
    assert written == [100.0, 130.0, 135.0]
    after(5, events.Progress("imle", 0, 1, 10, 0.5, {}))
    assert written == [100.0, 130.0, 135.0, 140.0], "a change of stage"
