"""Event files for TensorBoard, in the folder of a run: `tensorboard --logdir runs`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

FOLDER = "tensorboard"
FLUSH_S = 30


def is_installed() -> bool:
    """Whether the package that writes the files is there."""
    return find_spec("tensorboard") is not None


def require_tensorboard() -> None:
    """Refuse `tracking.tensorboard` without the package that writes the files.

    Raises:
        UserError: it is not installed here.
    """
    if not is_installed():
        raise UserError(
            "tracking.tensorboard=true needs the package tensorboard where the driver runs: `pip install tensorboard`, "
            "or set tracking.tensorboard=false"
        )


class EventFiles:
    """Writes numbers and pictures by step of the run. A start of the run writes a file of its own.

    What an earlier start has written from the first step of this one on is dropped by TensorBoard: steps after the last
    checkpoint are repeated.
    """

    def __init__(self, run_dir: Path) -> None:
        """Raises UserError if the package is not installed."""
        require_tensorboard()
        self.folder = run_dir / FOLDER
        self.writer: Any = None

    def add_numbers(self, metrics: dict[str, Any], step: int) -> None:
        """Add the numbers of an entry of the journal, named `stage/name` as in MLflow."""
        prefix = f"{metrics['stage']}/" if metrics.get("stage") else ""
        for name, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.at(step).add_scalar(prefix + name, value, step)

    def add_image(self, path: Path, key: str, step: int) -> None:
        """Add a picture to a series."""
        from PIL import Image

        with Image.open(path) as image:
            self.at(step).add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def at(self, step: int) -> Any:
        """The writer, which is made at the first step of this start."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=step, flush_secs=FLUSH_S)
        return self.writer

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
