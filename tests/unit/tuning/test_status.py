"""`glann jobs` shows how a study stands: trials that have ended, the best of them, the time left, and how it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from glann.errors import EnvironmentFault
from glann.reports.status import summary
from glann.trainers.run.recovery import RunStopped
from glann.trainers.run.status_file import status_file
from glann.tuning.ledger import Ledger
from glann.tuning.status import StudyTelemetry
from study_folder import make_study


def test_trials_the_best_of_them_and_the_time_left(tmp_path: Path):
    study, clock = make_study(tmp_path), [1000.0]
    ledger = Ledger(study.folder)
    ledger.end(ledger.start({}), state="finished", value=3.0)
    telemetry = StudyTelemetry(study, ledger, "http://mlflow", clock=lambda: clock[0])
    assert telemetry.status().left_s is None, "nothing has ended in this start"
    clock[0] += 600
    ledger.end(ledger.start({"glo.latent_lr": 0.01}), state="failed", why="not finite")
    ledger.end(ledger.start({"glo.latent_lr": 0.02}), state="finished", value=2.5)
    ledger.start({"glo.latent_lr": 0.03})
    status = telemetry.status()
    assert (status.stage, status.done, status.left_s) == ("3 of 12 trials", 0.25, 2700.0)
    assert summary(status, clock[0]) == "3 of 12 trials  45 min left  best fd_squeezenet 2.5, trial 2"


@pytest.mark.parametrize(
    ("error", "state"), [(RunStopped("the study is saved"), "stopped"), (EnvironmentFault("lost"), "failed")]
)
def test_the_end_is_written_beside_the_checkpoints(tmp_path: Path, error: Exception, state: str):
    study = make_study(tmp_path, overrides={"checkpoint.url": str(tmp_path / "shared")})
    telemetry = StudyTelemetry(study, Ledger(study.folder), None)
    with pytest.raises(type(error)), status_file(study.base(), telemetry):
        raise error
    written = (tmp_path / "shared" / study.name / "status.json").read_text()
    assert f'"state": "{state}"' in written
    assert str(error) in written
