"""A study without a trial leaves nothing behind, and one without a cluster is refused before anything is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from glann.datasets.pack import pack
from glann.errors import EnvironmentFault, UserError
from glann.trainers.run.recovery import RunStopped
from glann.tuning import driver
from glann.tuning.load import load_study
from glann.tuning.study import StudyConfig
from rich.console import Console

RECIPE = {
    "name": "tiny",
    "data": {"url": "noise", "resolution": 28, "channels": 1},
    "generator": {"kind": "infogan", "latent_dim": 8, "width": 4},
    "loss": {"kind": "l1"},
    "glo": {"epochs": 1, "batch_size": 4},
    "tracking": {"enabled": False},
}
STUDY = {"name": "small", "recipe": "tiny.yaml", "space": {"glo.latent_lr": {"uniform": [0.003, 0.1]}}}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StudyConfig]:
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    np.savez("noise.npz", images=np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8))
    pack("noise.npz", "noise", resolution=28, channels=1)
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    Path("study.yaml").write_text(yaml.safe_dump(STUDY | {"metric": "fd_squeezenet"}))
    monkeypatch.setattr(driver, "build_extractor", lambda name: None)
    yield load_study("study.yaml")
    os.environ.clear()  # `require_ray` sets variables for Ray
    os.environ.update(before)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is copied beside checkpoints in remote storage, from where a missing folder is restored."""
    copied: list[str] = []

    class Mirror:
        def __init__(self, base: Any, *_: Any) -> None:
            pass

        def send_soon(self) -> None:
            copied.append("soon")

        def close(self, report: Any) -> None:
            copied.append("closed")

    monkeypatch.setattr(driver, "RunMirror", Mirror)
    return copied


def run(study: StudyConfig) -> None:
    driver.run_study(study, Console(quiet=True))


def ending(error: BaseException, monkeypatch: pytest.MonkeyPatch, before: Callable[[Any], None] = lambda ledger: None):
    """Have the part of a study that needs a cluster end with an error."""

    def run_on_cluster(study: StudyConfig, base: Any, ledger: Any, *_: Any) -> None:
        before(ledger)
        raise error

    monkeypatch.setattr(driver, "run_on_cluster", run_on_cluster)


ENDS = (EnvironmentFault("no Ray"), RunStopped("stopped"), AttributeError("a bug"), KeyboardInterrupt())


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_a_study_without_a_trial_leaves_nothing(error: BaseException, study: StudyConfig, copies, monkeypatch):
    ending(error, monkeypatch)
    with pytest.raises(type(error)):
        run(study)
    assert not Path(study.folder).exists()
    assert copies == []
    Path("study.yaml").write_text(yaml.safe_dump(STUDY | {"metric": "l1"}))
    changed = load_study("study.yaml")
    with pytest.raises(type(error)):  # and not: holds another study
        run(changed)


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_a_trial_is_kept(error: BaseException, study: StudyConfig, copies, monkeypatch):
    ending(error, monkeypatch, lambda ledger: ledger.start({}))
    with pytest.raises(type(error)):
        run(study)
    assert (study.folder / "study.yaml").exists()
    assert copies == ["closed"]


def test_a_cluster_that_is_gone_is_noticed_before_data_are_packed(study: StudyConfig, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(driver, "open_data", lambda config, console: pytest.fail("packed first"))
    with pytest.raises(EnvironmentFault, match=r"nothing answers at 127.0.0.1:1 \(RAY_ADDRESS\)"):
        run(study)
    assert not Path(study.folder).exists()


def test_a_study_by_held_out_images_needs_some(study: StudyConfig, monkeypatch):
    """Refused before there is a trial: the data set holds none out."""
    monkeypatch.setattr(driver, "require_ray", lambda config: None)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY | {"metric": "fd_squeezenet:held-out"}))
    changed = load_study("study.yaml")
    with pytest.raises(UserError, match=r"metric=fd_squeezenet:held-out needs held-out images, and .*noise has none"):
        run(changed)
    assert not Path(changed.folder).exists()
