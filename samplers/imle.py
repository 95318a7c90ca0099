"""Stage 2 (IMLE): the mapping T from noise to latent codes, by nearest neighbours.

Shapes: B own rows of a global batch, D latent dimension, E noise dimension, N rows, n own rows,
M candidates, m own candidates, W workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..cluster.inverted_file import ivf_nearest
from ..cluster.neighbours import ring_nearest
from ..cluster.placement import global_batches, ranges
from ..config.run import Config
from ..config.schedule import factor
from ..errors import UserError
from ..models.mapping import Mapping
from ..models.noise import noise

CHUNK = 16384  # candidates mapped at once; also the noises that T's statistics are taken from


@dataclass(frozen=True)
class ImleEpoch:
    """What one epoch did: losses are means over all N rows; `distance` is that of the matches, before training.

    `recall`: share of codes that were matched with their true nearest candidate; 1 for the exact search.
    """

    epoch: int
    loss: float
    distance: float
    search_seconds: float
    recall: float
    votes: float


@dataclass(frozen=True)
class Matches:
    """Index of each own code's nearest candidate, and its squared distance (float64)."""

    index_n: Tensor
    distance_n: Tensor
    recall: float
    seconds: float


class MappingTrainer:
    """T, its Adam and where they stand; replicated on every worker and equal on all of them."""

    def __init__(self, mapping: Mapping, config: Config, device: torch.device, state: dict | None = None) -> None:
        self.mapping, self.device = mapping.to(device), device
        self.batch_statistics = config.imle.statistics == "batch"
        self.optimizer = torch.optim.Adam(
            mapping.parameters(), lr=config.imle.lr, weight_decay=config.imle.weight_decay
        )
        if state is None and not self.batch_statistics:
            index_B = torch.arange(CHUNK)
            # of the epoch after the last: noise that no candidate is made of
            mapping.fix_statistics(noise(config.seed, config.imle.epochs, index_B, config.imle.noise_dim, device))
        if state is not None:
            mapping.load_state_dict(state["weights"])
            for name, parameter in mapping.named_parameters():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["updates"])),
                    "exp_avg": state["exp_avg"][name].to(device),
                    "exp_avg_sq": state["exp_avg_sq"][name].to(device),
                }

    def update(
        self, e_BE: Tensor, z_BD: Tensor, batch_rows: int, lr: float, vote: float = 0.0
    ) -> tuple[Tensor, bool, float]:
        """One step on a global batch of which this worker holds B rows (maybe none).

        Returns:
            Sum of the squared distances over this worker's rows, whether the step was applied
            (not if any gradient of any worker was not finite), and the sum of all workers' votes.
        """
        error_B = (self.mapping(e_BE) - z_BD).square().sum(1)
        self.optimizer.zero_grad()
        (error_B.sum() / batch_rows).backward()
        grads = [cast(Tensor, parameter.grad) for parameter in self.mapping.parameters()]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([vote], device=self.device)])
        if world_size() > 1:
            dist.all_reduce(flat)  # a sum: each worker divided by the whole batch already
        finite, votes = torch.stack([flat[:-1].sum(), flat[-1]]).tolist()
        applied = math.isfinite(finite)
        if applied:
            for grad, summed in zip(grads, flat[:-1].split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view_as(grad))
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        return error_B.detach().sum(), applied, votes

    def state(self) -> dict[str, Any]:
        """Weights, Adam's moments by parameter name and the number of updates, on CPU."""
        state: dict[str, Any] = {
            "weights": {name: tensor.detach().cpu().clone() for name, tensor in self.mapping.state_dict().items()},
            "exp_avg": {},
            "exp_avg_sq": {},
            "updates": 0.0,
        }
        for name, parameter in self.mapping.named_parameters():
            slot = self.optimizer.state.get(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key][name] = slot[key].cpu().clone() if slot else torch.zeros_like(parameter, device="cpu")
            state["updates"] = float(slot["step"]) if slot else 0.0
        return state


def train_imle(
    config: Config,
    z_nD: Tensor,
    rows: range,
    total_rows: int,
    trainer: MappingTrainer,
    first_epoch: int,
    vote: Callable[[], float],
    ends: Callable[[float], bool] = lambda votes: False,
    enter: Callable[[str, int, int], None] = lambda phase, epoch, step: None,
) -> Iterator[ImleEpoch]:
    """Stage 2, Eqs. 5 and 6 of the paper: pull the nearest mapped noise of every code towards it.

    Yields after every epoch. A match is kept as an index; its noise is made again where it is needed. Where the
    votes ask to stop within an epoch it ends at once: the epoch is to be done again from its beginning.

    Args:
        z_nD: codes of this worker's rows. vote: asked at every update, see `StepResult`. enter: told
            (phase, epoch, step) before a search and before every update.
    Raises:
        UserError: `imle.max_bad_steps` steps in a row were not finite.
    """
    z_nD = z_nD.to(trainer.device)
    bad_in_a_row = 0
    for epoch in range(first_epoch, config.imle.epochs):
        enter("search", epoch, 0)
        matches = match(config, epoch, z_nD, total_rows, trainer.mapping)
        lr = config.imle.lr * factor(config.imle.schedule, epoch, config.imle.epochs)
        loss = torch.zeros((), device=trainer.device)
        trainer.mapping.train(trainer.batch_statistics)
        for step, batch in enumerate(global_batches(config.seed, epoch, total_rows, config.imle.batch_size)):
            enter("imle", epoch, step)
            own = torch.as_tensor(batch[(batch >= rows.start) & (batch < rows.stop)] - rows.start)
            e_BE = noise(config.seed, epoch, matches.index_n[own], config.imle.noise_dim, trainer.device)
            error, applied, votes = trainer.update(e_BE, z_nD[own.to(trainer.device)], len(batch), lr, vote())
            if ends(votes):
                return
            loss += error
            bad_in_a_row = 0 if applied else bad_in_a_row + 1
            if bad_in_a_row >= config.imle.max_bad_steps:
                raise UserError(
                    f"stage 2 was not finite for {bad_in_a_row} steps in a row in epoch {epoch}; lower imle.lr"
                )
        sums = torch.stack(
            [loss.double(), matches.distance_n.sum().to(loss.device), torch.tensor(vote(), device=loss.device)]
        )
        if world_size() > 1:
            dist.all_reduce(sums)
        loss_sum, distance_sum, votes = sums.tolist()
        yield ImleEpoch(epoch, loss_sum / total_rows, distance_sum / total_rows, matches.seconds, matches.recall, votes)


@torch.no_grad()
def match(config: Config, epoch: int, z_nD: Tensor, total_rows: int, mapping: nn.Module) -> Matches:
    """Search for the nearest candidate T(e_m) of each own code among all M (Eq. 5).

    T is in eval mode, so that a candidate does not depend on its batch mates.
    """
    began = perf_counter()
    mapping.eval()
    blocks = ranges(candidates(config, total_rows), world_size())
    mine = blocks[dist.get_rank() if world_size() > 1 else 0]
    block_mD = torch.empty(len(mine), z_nD.shape[1], device=z_nD.device)
    for start in range(0, len(mine), CHUNK):
        index_B = torch.arange(mine.start + start, min(mine.start + start + CHUNK, mine.stop))
        block_mD[start : start + CHUNK] = mapping(
            noise(config.seed, epoch, index_B, config.imle.noise_dim, z_nD.device)
        )
    search = config.imle.search
    if search.kind == "ivf":
        index_n, distance_n, recall = ivf_nearest(z_nD, block_mD, search.cells, search.probes)
    else:
        (index_n, distance_n), recall = ring_nearest(z_nD, block_mD), 1.0
    return Matches(index_n.cpu(), distance_n, recall, perf_counter() - began)


def candidates(config: Config, total_rows: int) -> int:
    """M, the number of candidates of an epoch."""
    return max(1, round(config.imle.candidates * total_rows))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
