"""IMLE: the mapping T from noise to latent codes, by nearest neighbours.

Shapes: B own rows of a global batch, D latent dimension, E noise dimension, N rows, n own rows, R own rows of many
batches, M candidates, m own candidates, W workers, K numbers of a piggyback, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import cast

import torch
from torch import Tensor

from ..cluster.inverted_file import ivf_nearest
from ..cluster.neighbours import ring_nearest
from ..cluster.placement import GlobalBatches, global_batches, ranges
from ..config.samplers import ImleConfig, ImleKeys, SamplerConfig
from ..errors import UserError
from ..models.comm import all_sum, rank, world_size
from ..models.cost import cost
from ..models.mapping import Mapping, build_mapping
from ..models.noise import Stream, noise
from ..models.norm import pending_statistics
from ..models.sphere import Constraint
from .adam import reduced_step, restore_moments, saved_moments
from .base import Codes, FitStep, Sampler, State
from .gathering import gather_array

ROWS_AT_ONCE = 1 << 18  # rows of all workers whose noise is made together: that of a whole epoch, as a rule
CHUNK = 16384  # candidates mapped at once; also the noise rows that fix T's statistics


@dataclass(frozen=True)
class Matches:
    """Index of each own code's nearest candidate, and its squared distance (float64).

    epoch_n: epoch of the candidates it was found among, whose noise is the match's. recall: share of codes matched with
    their true nearest candidate; 1 for the exact search.
    """

    index_n: Tensor
    epoch_n: Tensor
    distance_n: Tensor
    recall: float
    seconds: float


@dataclass(frozen=True)
class Pulls:
    """Numbers of candidates, and the row of the nearest code of each; of all workers."""

    number_P: Tensor
    row_P: Tensor


@dataclass(frozen=True)
class Pulled:
    """Noise of candidates and the codes nearest to what it maps to, on this worker; `total` of all workers."""

    e_PE: Tensor
    z_PD: Tensor
    total: int


class Imle(Sampler):
    """IMLE: T and its Adam optimiser (Hoshen et al. 2019, Sec. 3.2)."""

    title = "IMLE"
    network: Mapping
    config: ImleKeys

    def setup(self, state: State | None) -> None:
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        if state is not None:
            restore_moments(self.network, self.optimizer, state)
        elif self.config.normalisation == "batch" and self.config.statistics == "noise":
            # noise of the epoch after the last, which no candidate uses
            index_B = torch.arange(CHUNK)
            e_BE = noise(self.seed, self.epochs, index_B, self.config.noise_dim, self.device)
            self.network.fix_statistics(e_BE)
        self.held = (state or {}).get("matches", {})  # of all rows, where they outlast an epoch

    @staticmethod
    def build(config: SamplerConfig, latent_dim: int, constraint: Constraint) -> Mapping:
        return build_mapping(cast(ImleKeys, config), latent_dim, constraint)

    def fit(
        self,
        codes: Codes,
        first_epoch: int,
        piggyback: Callable[[], Tensor],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> Iterator[FitStep]:
        """Pull the nearest mapped noise of every code towards the code (Eqs. 5 and 6 of the paper).

        A match is stored as an index; its noise is generated again when needed. The facts of an epoch are means over
        all N rows; `distance` is that of the matches, before training.
        """
        if self.config.untrainable:
            raise UserError(self.config.untrainable)
        z_nD = codes.z_nD.to(self.device)
        bad_in_a_row = 0
        for epoch in range(first_epoch, self.epochs):
            enter("search")
            matches = self.matches(epoch, z_nD, codes)
            enter(self.config.kind)
            lr = self.config.lr * self.config.schedule.factor(epoch, self.epochs)
            loss = torch.zeros((), device=self.device)
            batches = global_batches(self.seed, epoch, codes.total, self.config.batch_of(codes.total))
            pulls = self.pulls(epoch, z_nD, codes) if self.config.chamfer else None
            self.network.train(self.config.statistics == "batch")
            for step, (e_BE, z_BD) in enumerate(self.pairs(epoch, batches, matches, z_nD, codes.rows)):
                pulled = self.pulled(pulls, epoch, step, len(batches), z_nD, codes) if pulls else None
                error, applied, piggyback_K = self.update(e_BE, z_BD, batches.size(step), lr, piggyback(), pulled)
                loss += error
                bad_in_a_row = 0 if applied else bad_in_a_row + 1
                yield FitStep(epoch, step, len(batches), piggyback_K, applied)
                if bad_in_a_row >= self.config.max_bad_steps:
                    raise UserError(
                        f"IMLE was not finite for {bad_in_a_row} steps in a row in epoch {epoch}; lower sampler.lr"
                    )
            yield self._end_of_epoch(epoch, len(batches), codes.total, loss, matches, piggyback())

    def pairs(
        self, epoch: int, batches: GlobalBatches, matches: Matches, z_nD: Tensor, rows: range
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The noise and the code of this worker's rows of every batch, [B, E] and [B, D].

        Their noise is made for many steps at once: made for one, it would be half of the step's work.
        """
        order_n, first_S = batches.own(rows)
        steps = max(1, ROWS_AT_ONCE // batches.size(0))
        for start in range(0, len(batches), steps):
            bounds = first_S[start : start + steps + 1]
            row_R = torch.as_tensor(order_n[bounds[0] : bounds[-1]])
            own_R = row_R - rows.start
            e_RE = self.noise_of(matches.epoch_n[own_R], matches.index_n[own_R])
            if self.config.noise_on_match:
                more_RE = noise(self.seed, epoch, row_R, self.config.noise_dim, self.device, Stream.TRAINING)
                e_RE = e_RE + self.config.noise_on_match * more_RE
            z_RD = z_nD[own_R.to(self.device)]
            for first, last in pairwise((bounds - bounds[0]).tolist()):
                yield e_RE[first:last], z_RD[first:last]

    def update(
        self,
        e_BE: Tensor,
        z_BD: Tensor,
        batch_rows: int,
        lr: float,
        piggyback_K: Tensor,
        pulled: Pulled | None = None,
    ) -> tuple[Tensor, bool, Tensor]:
        """One step on a global batch, of which this worker holds B rows (possibly none), and on candidates beside it.

        Returns:
            Sum of the squared distances over this worker's rows, whether the step was applied
            (False if the gradient of a weight, its square, or a moment was not finite), and the sum of all workers'
            piggybacks.
        """
        rows = len(z_BD)
        if pulled is not None:
            e_BE, z_BD = torch.cat([e_BE, pulled.e_PE]), torch.cat([z_BD, pulled.z_PD])
        with pending_statistics(self.network) as statistics:
            error_B, error_P = (self.network(e_BE) - z_BD).square().sum(1).tensor_split([rows])
        loss = error_B.sum() / batch_rows
        if pulled is not None:
            loss = loss + self.config.chamfer * error_P.sum() / pulled.total
        applied, carried_K = reduced_step(self.network, self.optimizer, loss, lr, piggyback_K, statistics)
        return error_B.detach().sum(), applied, carried_K

    def matches(self, epoch: int, z_nD: Tensor, codes: Codes) -> Matches:
        """The matches to train on in an epoch: new ones, or those of an epoch before. Collective."""
        every = cast(ImleConfig, self.config).staleness
        if every == 1:
            return self.match(epoch, z_nD, codes.total)
        if epoch % every == 0 or not self.held:
            fresh = self.match(epoch, z_nD, codes.total)
            self.held = self.gathered(fresh, codes)
            return fresh
        return self.own_matches(self.held, codes)

    @torch.no_grad()
    def pulls(self, epoch: int, z_nD: Tensor, codes: Codes) -> Pulls:
        """The nearest code of each candidate that is trained on, of all workers. Collective."""
        block_mD, number_M = self.candidate_codes(epoch, z_nD, codes.total)
        number = candidates(self.config, codes.total)
        number_P = torch.arange(number) if number_M is None else number_M
        mine = ranges(number, world_size())[rank()]
        row_P = torch.zeros(len(number_P), dtype=torch.int64, device=z_nD.device)
        row_P[(number_P >= mine.start) & (number_P < mine.stop)] = ring_nearest(block_mD, z_nD)[0]
        return Pulls(number_P, all_sum(row_P).cpu())

    def pulled(self, pulls: Pulls, epoch: int, step: int, steps: int, z_nD: Tensor, codes: Codes) -> Pulled:
        """What a step trains on of the candidates whose nearest codes are rows of this worker."""
        number_P, row_P = pulls.number_P[step::steps], pulls.row_P[step::steps]
        own_P = (row_P >= codes.rows.start) & (row_P < codes.rows.stop)
        e_PE = noise(self.seed, epoch, number_P[own_P], self.config.noise_dim, self.device)
        return Pulled(e_PE, z_nD[(row_P[own_P] - codes.rows.start).to(z_nD.device)], max(1, len(number_P)))

    def gathered(self, matches: Matches, codes: Codes) -> dict[str, Tensor]:
        """The matches of all rows, for the state. Collective."""
        own = {"index": matches.index_n, "epoch": matches.epoch_n, "distance": matches.distance_n}
        return {name: gather_array(array_n.to(self.device), codes).cpu() for name, array_n in own.items()}

    def own_matches(self, held: dict[str, Tensor], codes: Codes) -> Matches:
        """This worker's share of matches of all rows."""
        own = slice(codes.rows.start, codes.rows.stop)
        return Matches(held["index"][own], held["epoch"][own], held["distance"][own].to(self.device), 1.0, 0.0)

    def noise_of(self, epoch_B: Tensor, index_B: Tensor) -> Tensor:
        """The noise e_BE of candidates of any epochs."""
        return noise(self.seed, epoch_B, index_B, self.config.noise_dim, self.device)

    @torch.no_grad()
    def match(self, epoch: int, z_nD: Tensor, total_rows: int) -> Matches:
        """Search for the nearest candidate T(e_m) of each own code among all M (Eq. 5).

        T is in eval mode, so that a candidate does not depend on its batch mates.
        """
        began = perf_counter()
        block_mD, number_M = self.candidate_codes(epoch, z_nD, total_rows)
        search = self.config.search
        if search.kind == "ivf":
            index_n, distance_n, recall = ivf_nearest(z_nD, block_mD, search.cells, search.probes)
        else:
            (index_n, distance_n), recall = ring_nearest(z_nD, block_mD), 1.0
        if unmatched := int((~distance_n.isfinite()).sum()):
            raise RuntimeError(f"the {search.kind} search left {unmatched} of {len(z_nD)} codes without a candidate")
        index_n = index_n.cpu() if number_M is None else number_M[index_n.cpu()]
        return Matches(index_n, torch.full_like(index_n, epoch), distance_n, recall, perf_counter() - began)

    def candidate_codes(self, epoch: int, z_nD: Tensor, total_rows: int) -> tuple[Tensor, Tensor | None]:
        """T(e_m) of this worker's candidates, and the numbers m of all workers' candidates (None: all of them)."""
        self.network.eval()
        mine = ranges(candidates(self.config, total_rows), world_size())[rank()]
        block_mD = torch.empty(len(mine), z_nD.shape[1], device=z_nD.device)
        for start in range(0, len(mine), CHUNK):
            index_B = torch.arange(mine.start + start, min(mine.start + start + CHUNK, mine.stop))
            e_BE = noise(self.seed, epoch, index_B, self.config.noise_dim, z_nD.device)
            block_mD[start : start + CHUNK] = self.network(e_BE)
        return block_mD, None

    def state(self) -> State:
        """Weights, Adam's moments, and matches that outlast an epoch; on the CPU."""
        matches = {"matches": {name: array_N.clone() for name, array_N in self.held.items()}} if self.held else {}
        return super().state() | saved_moments(self.network, self.optimizer) | matches

    @classmethod
    def flops(cls, config: SamplerConfig, latent_dim: int, rows: int) -> float:
        """Per epoch: map M candidates, compare N rows with each of them (2 N M D), train on N matches.

        With `chamfer` also map and compare them the other way round, and train on each.
        """
        imle = cast(ImleKeys, config)
        with torch.device("meta"):
            mapping = cost(build_mapping(imle, latent_dim), (imle.noise_dim,))
        number = imle.candidates * rows
        search = 2.0 * rows * number * latent_dim
        ways, trained = (2, rows + number) if imle.chamfer else (1, rows)
        return imle.epochs * (ways * (number * mapping.forward_flops + search) + trained * mapping.flops)

    @classmethod
    def steps(cls, config: SamplerConfig, rows: int) -> int:
        imle = cast(ImleKeys, config)
        return imle.epochs * math.ceil(rows / imle.batch_of(rows))

    def _end_of_epoch(
        self, epoch: int, steps: int, total: int, loss: Tensor, matches: Matches, piggyback_K: Tensor
    ) -> FitStep:
        """The last step of an epoch, which only reduces its metrics."""
        own_2 = torch.stack([loss.double(), matches.distance_n.sum().to(loss.device)])
        sums = all_sum(torch.cat([own_2, piggyback_K.to(loss.device).double()])).tolist()
        facts = {
            "loss": sums[0] / total,
            "distance": sums[1] / total,
            "search_seconds": matches.seconds,
            "recall": matches.recall,
        }
        return FitStep(epoch, steps, steps, torch.tensor(sums[2:], dtype=torch.float32), True, facts)


def candidates(config: ImleKeys, total_rows: int) -> int:
    """M, the number of candidates per epoch."""
    return max(1, round(config.candidates * total_rows))


SAMPLER = Imle
