"""Control signals (save, move, stop), which all workers act on at the same step.

A worker adds its signals to the next step as a piggyback of `SIGNALS` numbers. The step returns their sums over all
workers from its own all-reduce, so that all workers read the same signals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

SIGNALS = 3  # save, move, stop


class Request(IntEnum):
    """Request of the driver to the workers; a larger value is more urgent."""

    NOTHING = 0
    MOVE = 1  # end at the next checkpoint, so that a group of another size can start
    STOP = 2  # save and end now


@dataclass(frozen=True)
class Signals:
    """The signals that at least one worker has set."""

    save: bool
    move: bool
    stop: bool

    def ends(self, saving: bool) -> bool:
        """Whether the group ends after this step: on stop always, on move only with a checkpoint that is due anyway."""
        return self.stop or (saving and self.move)


class Control:
    """Writes a worker's signals, and reads the sum over all workers.

    Args:
        requested: returns the last request of the driver that has reached this worker.
        save_due: whether a checkpoint is due by the clock; only one worker checks it.
    """

    def __init__(self, requested: Callable[[], Request], save_due: Callable[[], bool]) -> None:
        self._requested, self._save_due = requested, save_due

    def write(self) -> Tensor:
        """The piggyback of this worker's next step, float32 [SIGNALS]."""
        request = self._requested()
        return torch.tensor([self._save_due(), request == Request.MOVE, request == Request.STOP], dtype=torch.float32)

    @staticmethod
    def read(sum_K: Tensor) -> Signals:
        """Decode the sum over all workers."""
        save, move, stop = (sum_K > 0).tolist()
        return Signals(save, move, stop)
