"""RS-IMLE (Vashist, Peng & Li 2024): IMLE whose candidates are drawn from what no code explains yet.

T is trained on matches, which are nearer to codes than candidates as a rule are; so the noise it is trained with is not
distributed like the noise it is sampled with. Candidates within epsilon of any code are therefore rejected before the
search: a match is then at least as far as that.

Shapes: D latent dimension, n own rows, M candidates, m own candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cluster.neighbours import ring_nearest
from ..cluster.placement import ranges
from ..config.samplers import RsImleConfig
from ..errors import UserError
from ..models.comm import all_sum, rank, world_size
from .base import Codes
from .imle import Imle, Matches, candidates


class RsImle(Imle):
    """The fit: the ring of `imle.py` first with its roles swapped, to find the code nearest to every candidate."""

    title = "RS-IMLE"
    config: RsImleConfig

    def matches(self, epoch: int, z_nD: Tensor, codes: Codes) -> Matches:
        return self.match(epoch, z_nD, codes.total)

    def candidate_codes(self, epoch: int, z_nD: Tensor, total_rows: int) -> tuple[Tensor, Tensor | None]:
        block_mD, _ = super().candidate_codes(epoch, z_nD, total_rows)
        kept_m = ring_nearest(block_mD, z_nD)[1] >= self.config.epsilon**2
        number = candidates(self.config, total_rows)
        mine = ranges(number, world_size())[rank()]
        kept_M = torch.zeros(number, dtype=torch.int32, device=z_nD.device)
        kept_M[mine.start : mine.stop] = kept_m.int()
        number_M = all_sum(kept_M).nonzero()[:, 0].cpu()
        if not len(number_M):
            raise UserError(
                f"all {number} candidates of epoch {epoch} lie within sampler.epsilon={self.config.epsilon} of a code; "
                "lower it, or raise sampler.candidates"
            )
        return block_mD[kept_m], number_M


SAMPLER = RsImle
