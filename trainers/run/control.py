"""Control signals: what the driver, or the clock, wants of the workers, agreed on by all of them at the same step.

A worker adds its own wishes to the next step as a piggyback of `SIGNALS` numbers. The step returns their sums over all
workers with its own exchange, so that every worker reads the same, and does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

SIGNALS = 3  # save, move, stop


class Request(IntEnum):
    """What the driver wants of the workers; the larger, the more urgent."""

    NOTHING = 0
    MOVE = 1  # end at the next checkpoint, so that a group of another size can start
    STOP = 2  # save and end now


@dataclass(frozen=True)
class Signals:
    """What at least one worker wants."""

    save: bool
    move: bool
    stop: bool

    def ends(self, saving: bool) -> bool:
        """Whether the group ends here: at once, or, to move, with a checkpoint that is made anyway."""
        return self.stop or (saving and self.move)


class Control:
    """A worker's end: writes its wishes, and reads what all workers together want.

    Args:
        requested: what the driver wants, as far as this worker knows.
        save_due: whether the time for a checkpoint has come; one worker watches the clock for all.
    """

    def __init__(self, requested: Callable[[], Request], save_due: Callable[[], bool]) -> None:
        self._requested, self._save_due = requested, save_due

    def write(self) -> Tensor:
        """The piggyback of this worker's next step, float32 [SIGNALS]."""
        request = self._requested()
        return torch.tensor([self._save_due(), request == Request.MOVE, request == Request.STOP], dtype=torch.float32)

    @staticmethod
    def read(sum_K: Tensor) -> Signals:
        """What the sum over all workers says."""
        save, move, stop = (sum_K > 0).tolist()
        return Signals(save, move, stop)
