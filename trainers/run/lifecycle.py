"""Context of a command that works on the folder of a run or study: exclusive lock and tracking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...config.run import Config
from ...reports.run_folder import write_config
from ...tracking.runs import DataInput, Status, TrackedRun
from .preflight import sole_command
from .recovery import RunStopped


@contextmanager
def open_run(
    config: Config,
    folder: Path,
    command: str,
    tags: Mapping[str, str],
    parent_run_id: str | None = None,
    data: DataInput | None = None,
) -> Iterator[TrackedRun]:
    """Lock a folder and open its tracked run; on exit its final status is sent to MLflow.

    Args:
        command: name of the `glann` command, for the error of a concurrent one.
        tags: of the run in MLflow. data: its training images.
    Raises:
        UserError: another command is working on the folder, or the tracking server cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with sole_command(folder, command):
        tracked = TrackedRun.open(config, folder, dict(tags), parent_run_id=parent_run_id, data=data)
        status: Status = "FAILED"
        try:
            write_config(folder, config)
            yield tracked
            status = "FINISHED"
        except (RunStopped, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            tracked.finish(status)
