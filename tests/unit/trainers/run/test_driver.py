"""A run that has not begun leaves nothing behind: its name is free for another configuration. Results are kept."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from glann.cluster.checkpoints.lease import RunTaken
from glann.config.run import Config, load
from glann.datasets.pack import pack
from glann.errors import EnvironmentFault, UserError
from glann.trainers.run import driver
from glann.trainers.run.preflight import LOCK
from glann.trainers.run.recovery import RunStopped
from rich.console import Console

SMALL = ["data.url=noise", "data.source=null", "loss.kind=l1", "cluster.workers=1", "tracking.enabled=false"]
# What may end a command before its first epoch.
ENDS: list[Callable[[], BaseException]] = [
    lambda: UserError("wrong input"),
    lambda: EnvironmentFault("no Ray cluster at 10.0.0.1:6379"),
    lambda: EnvironmentFault("the cluster has room for 0 of 1 workers"),
    lambda: RunStopped("the run was stopped"),
    lambda: AttributeError("a bug"),
    KeyboardInterrupt,
    lambda: SystemExit(15),
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    np.savez("noise.npz", images=np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8))
    pack("noise.npz", "noise", resolution=28, channels=1)
    monkeypatch.setattr(driver, "build_extractor", lambda name: None)
    yield load("digits", [*SMALL, "name=tiny"])
    os.environ.clear()  # `require_ray` sets variables for Ray
    os.environ.update(before)


def train(config: Config) -> None:
    driver.train(config, Console(quiet=True))


def ending(error: BaseException, monkeypatch: pytest.MonkeyPatch, before: Callable[[Any], None] = lambda tracked: None):
    """Have the part of a run that needs workers end with an error."""

    def run(config: Config, index: Any, tracked: Any, *_: Any) -> None:
        before(tracked)
        raise error

    monkeypatch.setattr(driver, "run", run)


@pytest.mark.parametrize("end", ENDS, ids=[type(end()).__name__ + str(number) for number, end in enumerate(ENDS)])
def test_what_has_not_begun_leaves_nothing(end: Callable[[], BaseException], config: Config, monkeypatch):
    ending(end(), monkeypatch)
    with pytest.raises(type(end())):
        train(config)
    assert not config.run_dir.exists()
    other = load("digits", [*SMALL, "name=tiny", "glo.epochs=2"])
    with pytest.raises(type(end())):  # and not: holds a run of another configuration
        train(other)


@pytest.mark.parametrize("end", ENDS[1:], ids=[type(end()).__name__ + str(n) for n, end in enumerate(ENDS[1:])])
def test_an_epoch_is_kept(end: Callable[[], BaseException], config: Config, monkeypatch):
    ending(end(), monkeypatch, lambda tracked: tracked.journal.append({"stage": "glo", "epoch": 1, "loss": 1.0}))
    with pytest.raises(type(end())):
        train(config)
    assert (config.run_dir / "config.yaml").exists()
    with pytest.raises(UserError, match="a run of another configuration"):
        train(load("digits", [*SMALL, "name=tiny", "glo.epochs=2"]))


def test_results_in_a_store_that_does_not_answer_are_not_taken_for_none(config: Config, monkeypatch):
    def survey(store: Any) -> None:
        raise EnvironmentFault("the store does not answer")

    ending(EnvironmentFault("lost"), monkeypatch, lambda tracked: monkeypatch.setattr(driver, "survey", survey))
    with pytest.raises(EnvironmentFault, match="lost"):
        train(config)
    assert (config.run_dir / "config.yaml").exists()


def test_the_folder_of_a_command_that_was_there_first_is_not_removed(config: Config, monkeypatch):
    """Two commands start at the same moment: the one that comes second is refused, and removes nothing."""

    class First:
        def __enter__(self) -> None:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            self.lock = (config.run_dir / LOCK).open("w")
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            raise RunTaken("another command trains this run")

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(driver, "hold", lambda store, say: First())
    with pytest.raises(RunTaken):
        train(config)
    assert (config.run_dir / LOCK).exists()


def test_a_command_refused_for_another_elsewhere_leaves_nothing_here(config: Config, monkeypatch):
    """The same run from another folder: the checkpoints in the store are those of the command that holds it."""

    def taken(store: Any, say: Any) -> None:
        raise RunTaken("process 7 has been training the run")

    monkeypatch.setattr(driver, "hold", taken)
    monkeypatch.setattr(driver, "survey", lambda store: SimpleNamespace(good=[4], damaged=[]))
    with pytest.raises(RunTaken):
        train(config)
    assert not config.run_dir.exists()


def test_a_cluster_that_is_gone_is_noticed_before_data_are_packed(config: Config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(driver, "open_data", lambda config, console: pytest.fail("packed first"))
    with pytest.raises(EnvironmentFault, match=r"nothing answers at 127.0.0.1:1 \(RAY_ADDRESS\)"):
        train(config)
    assert not Path("runs").exists()
