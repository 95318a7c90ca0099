"""Steps in a row that were not finite, up to the number at which a run is of no use."""

from __future__ import annotations

from ..errors import UserError
from .stage import StageStep


class BadSteps:
    """Counts them. limit: at which it raises. rates: the keys to lower, for the message."""

    def __init__(self, limit: int, rates: str) -> None:
        self.limit, self.rates, self.in_a_row = limit, rates, 0

    def count(self, step: StageStep) -> None:
        """Take note of a step; one without a readable image is none.

        Raises:
            UserError: it was the last of `limit` steps in a row that were not applied.
        """
        if step.loss is None:
            return
        self.in_a_row = 0 if step.applied else self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise UserError(
                f"loss or gradients were not finite for {self.in_a_row} steps in a row, up to epoch {step.epoch} step "
                f"{step.step} (rows here {list(step.rows_B[:8])}...); lower {self.rates}, or set engine.precision=fp32"
            )
