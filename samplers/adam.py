"""Samplers whose network is trained with Adam on global batches of codes, data-parallel over the rows.

Shapes: B own rows of a global batch, T all rows of it, D latent dimension, n own rows, K numbers of a piggyback.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..cluster.placement import global_batches
from ..cluster.row_optimizers import gradient_fault
from ..config.samplers import SamplerConfig, TrainedConfig
from ..errors import UserError
from ..models.comm import all_sum
from ..models.mapping import Standardised
from ..models.norm import PendingMoments
from .base import Codes, FitStep, Sampler, State, build_network
from .gaussian import gaussian

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Batch:
    """A global batch.

    index_T: what the noise of the batch is numbered by, the rows of the codes as a rule. own_B: the places in the batch
    that this worker trains on. z_BD: their codes, standardised.
    """

    epoch: int
    index_T: np.ndarray
    own_B: Tensor
    z_BD: Tensor

    @property
    def index_B(self) -> Tensor:
        """What the noise of this worker's rows is numbered by, int64 [B]."""
        return torch.as_tensor(self.index_T)[self.own_B]


class AdamSampler(Sampler):
    """Base of such samplers: a kind defines its network and `loss`.

    A random number of the training is a function of (seed, epoch, row), and a step sums the gradients of its rows over
    workers: so the path does not depend on their number, but for the rounding of that sum.
    """

    config: TrainedConfig
    network: Standardised

    def setup(self, state: State | None) -> None:
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        if state is not None:
            restore_moments(self.network, self.optimizer, state)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Loss of each own row, loss_B; collective where a kind looks at the whole batch."""

    def prepare(self, codes: Codes, enter: Callable[[str], None]) -> None:
        """Work of a kind before the first of the epochs to come. Collective."""

    def begin_epoch(self, epoch: int, codes: Codes) -> None:
        """Work of a kind at the beginning of an epoch. Collective."""

    def targets(self, index_T: np.ndarray, codes: Codes) -> tuple[Tensor, Tensor]:
        """The own places in a batch, own_B, and this worker's row of the code of each."""
        mine_T = (index_T >= codes.rows.start) & (index_T < codes.rows.stop)
        own_B = torch.as_tensor(np.flatnonzero(mine_T))
        return own_B, torch.as_tensor(index_T[mine_T] - codes.rows.start)

    def fit(
        self,
        codes: Codes,
        first_epoch: int,
        piggyback: Callable[[], Tensor],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Iterator[FitStep]:
        """`loss` is the mean over the rows of an epoch."""
        if first_epoch >= self.epochs:
            return
        if first_epoch == 0:
            fitted = gaussian(codes.z_nD, codes.total, self.device)
            self.network.standardise(fitted["mean"], fitted["root"])
        self.prepare(codes, enter)
        z_nD = self.network.standard(codes.z_nD.to(self.device))
        bad_in_a_row = 0
        for epoch in range(first_epoch, self.epochs):
            enter(self.config.kind)
            self.begin_epoch(epoch, codes)
            total = torch.zeros((), device=self.device)
            batches = global_batches(self.seed, epoch, codes.total, self.config.batch_size)
            for step, index_T in enumerate(batches):
                own_B, row_B = self.targets(index_T, codes)
                batch = Batch(epoch, index_T, own_B, z_nD[row_B.to(self.device)])
                lr = self.config.lr * self.config.schedule.factor(epoch + step / len(batches), self.epochs)
                self.network.train()
                loss_B = self.loss(batch)
                applied, carried_K = reduced_step(
                    self.network, self.optimizer, loss_B.sum() / len(index_T), lr, piggyback()
                )
                total += loss_B.detach().sum()
                bad_in_a_row = 0 if applied else bad_in_a_row + 1
                yield FitStep(epoch, step, len(batches), carried_K, applied)
                if bad_in_a_row >= self.config.max_bad_steps:
                    raise UserError(
                        f"{self.title} was not finite for {bad_in_a_row} steps in a row in epoch {epoch}; "
                        "lower sampler.lr"
                    )
            sums = all_sum(torch.cat([total.double()[None], piggyback().to(self.device).double()])).tolist()
            facts = {"loss": sums[0] / codes.total}
            yield FitStep(epoch, len(batches), len(batches), torch.tensor(sums[1:]).float(), True, facts)

    def state(self) -> State:
        """Weights, Adam's moments by parameter name and the number of updates, on the CPU."""
        return super().state() | saved_moments(self.network, self.optimizer)

    @classmethod
    def flops(cls, config: SamplerConfig, latent_dim: int, rows: int) -> float:
        """Two operations for each weight forward, and four backward."""
        trained = cast(TrainedConfig, config)
        with torch.device("meta"):
            network = build_network(config, latent_dim, "sphere")
        weights = sum(parameter.numel() for parameter in network.parameters())
        return 6.0 * trained.epochs * rows * weights

    @classmethod
    def steps(cls, config: SamplerConfig, rows: int) -> int:
        trained = cast(TrainedConfig, config)
        return trained.epochs * math.ceil(rows / trained.batch_size)


def reduced_step(
    network: torch.nn.Module,
    optimizer: torch.optim.Adam,
    loss: Tensor,
    lr: float,
    piggyback_K: Tensor,
    statistics: PendingMoments | None = None,
) -> tuple[bool, Tensor]:
    """One step of Adam on the loss summed over workers. Collective.

    Args:
        loss: this worker's part of the loss; the sum over workers is the loss of the global batch.
        statistics: moments of the batch, which enter the running statistics if the step is applied.
    Returns:
        Whether the step was applied (False if the gradient of a weight, its square, or a moment was not finite), and
        the sum of all workers' piggybacks.
    """
    optimizer.zero_grad()
    loss.backward()
    grads = [cast(Tensor, parameter.grad) for parameter in network.parameters()]
    flat = torch.cat([*(grad.flatten() for grad in grads), piggyback_K.to(grads[0].device)])
    all_sum(flat)
    summed, piggyback_K = flat[: len(flat) - len(piggyback_K)], flat[len(flat) - len(piggyback_K) :]
    checked = gradient_fault(summed[None])
    if statistics is not None:
        checked = checked + statistics.fault(summed.device)
    fault, *carried = torch.cat([checked[None], piggyback_K]).tolist()
    applied = fault == 0.0
    if applied:
        if statistics is not None:
            statistics.commit()
        for grad, part in zip(grads, summed.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return applied, torch.tensor(carried)


def saved_moments(network: torch.nn.Module, optimizer: torch.optim.Adam) -> State:
    """Adam's moments by parameter name and the number of updates, on the CPU."""
    state: State = {"exp_avg": {}, "exp_avg_sq": {}, "updates": 0.0}
    for name, parameter in network.named_parameters():
        slot = optimizer.state.get(parameter)
        for key in MOMENTS:
            state[key][name] = slot[key].cpu().clone() if slot else torch.zeros_like(parameter, device="cpu")
        state["updates"] = float(slot["step"]) if slot else 0.0
    return state


def restore_moments(network: torch.nn.Module, optimizer: torch.optim.Adam, state: State) -> None:
    """Set Adam's moments to those of `saved_moments`."""
    for name, parameter in network.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state["updates"])),
            **{key: state[key][name].to(parameter.device).clone() for key in MOMENTS},
        }
