"""Samplers that are fitted in closed form: one epoch of one step.

Shapes: K numbers of a piggyback.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor

from ..models.comm import all_sum
from .base import Codes, FitStep, Sampler


class ClosedForm(Sampler):
    """Base of such samplers: a kind defines its network and `solve`."""

    @abstractmethod
    def solve(self, codes: Codes) -> float:
        """Set the network to the solution; returns the `loss` to report. Collective."""

    def fit(
        self,
        codes: Codes,
        first_epoch: int,
        piggyback: Callable[[], Tensor],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Iterator[FitStep]:
        if first_epoch >= self.epochs:
            return
        enter(self.config.kind)
        loss = self.solve(codes)
        yield FitStep(0, 0, 1, all_sum(piggyback().to(self.device)).cpu(), True, {"loss": loss})
