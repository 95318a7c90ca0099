"""Certified exact nearest neighbours: the result of brute force in float64, at the speed of float32.

Pairs are compared by one float32 GEMM per tile; an error bound says which candidates could still be the
nearest, and only those are compared again in float64 from their coordinates. Ties go to the lowest index.

**The bound.** Let z, c be float32 vectors of dimension D, u = 2**-24, and write s = |c|^2 - 2 z.c, so
that |z - c|^2 = |z|^2 + s. A sum of D + 1 products, in whatever order and with or without fused
multiply-add, is off by at most gamma_{D+1} = (D+1)u / (1 - (D+1)u) times the sum of the products'
magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1), which here is at
most |c|^2 + 2|z||c| <= |z|^2 + 2|c|^2. Added to that are, in units of u(|z|^2 + 2|c|^2): 1.01 for rounding |c|^2,
4.01 for rounding the centred coordinates (below), 1.01 for the addition that makes an upper bound, and 1
for the rounding of the float64 distances themselves. All of it is covered by

    |s_computed - s| <= kappa (|z|^2 + 2|c|^2) + eta,    kappa = gamma_{D+12},

where eta = D 2**-118 covers products that underflow. The part 2 kappa |c|^2 is subtracted from |c|^2
before the GEMM, so an entry of a tile is a lower bound of s up to kappa |z|^2 + eta, and the entry plus
4 kappa |c|^2 is an upper bound up to the same. If U is the float64 distance of the best candidate
so far (or such an upper bound plus |z|^2), every candidate that could be as near has an entry

    <= U - |z|^2 + kappa |z|^2 + eta,

and a tile whose minimum for a query is above that contains no nearer candidate. Nothing is assumed of the codes:
unit vectors, very different norms, a large offset from the origin and exact duplicates only change how many
candidates are compared again.

**Scaling and centring.** Coordinates are scaled by a power of two so that nothing overflows, and the mean of
the candidates is subtracted, which makes the bound tight for points far from the origin. Both are
exact up to one rounding per coordinate (counted above), and affect the bound only: distances are
taken from the original coordinates.

**Candidates that lie together**, such as those of a mapping whose units have died, would all be compared again: all
pairs, one by one. So of equal candidates only the first is searched, the one that a tie goes to. And where float32
leaves many candidates of a tile, one float64 GEMM separates them by the same bound with u = 2**-53; its
kappa = gamma_{3D+30} also covers the roundings of the float64 distances, at most 2 (log2 D + 4) units.

Legend: N queries (n: of this worker), M candidates (m: of a block), D dimension, W workers,
Q and C the queries and candidates of a tile, T tiles, E = D + 1, H queries whose tile is refined, K pairs of
(query, candidate).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from ..models.comm import gather, rank, world_size
from .distinct import distinct_rows

_UNIT = 2.0**-24
_CPU_TILE = (256, 1024)  # per thread: 1 MiB, about one core's second-level cache
_GPU_TILE = (4096, 8192)
_GROUP = 16  # tiles per side that share their preparation and refinement
_CROWD = 16  # pairs left per query of a tile above which a GEMM in float64 costs less than comparing them one by one
_EXACT_NUMBERS = 1 << 21  # float64 numbers in memory at a time while pairs are compared again
_NO_INDEX = torch.iinfo(torch.int64).max


def nearest(z_ND: Tensor, candidates_MD: Tensor, first_index: int = 0) -> tuple[Tensor, Tensor]:
    """Find the exact nearest candidate of every query.

    Args:
        z_ND, candidates_MD: float32 on one device.
        first_index: index of the first candidate.
    Returns:
        index_N (int64) and distance_N (float64): the *squared* Euclidean distance. Equal float64
        distances go to the lowest index. Memory is O(N + tile), never N x M.
    Raises:
        UserError: a NaN or infinity, no candidates, or shapes or types that do not match.
    """
    check_shapes(z_ND, candidates_MD)
    for name, x in (("queries", z_ND), ("candidates", candidates_MD)):
        if bad := _unusable(x):
            raise UserError(_not_finite(bad, name))
    if not len(candidates_MD) and len(z_ND):
        raise UserError("there are no candidates to search among; raise imle.candidates")
    search = NearestSearch(z_ND)
    search.add(candidates_MD, first_index)
    return search.index_N, search.distance_N


def ring_nearest(z_nD: Tensor, block_mD: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Collective: the nearest of all workers' candidates for this worker's queries.

    Blocks travel around a ring: while a worker compares its queries with one block it sends that block
    to the next worker and receives another. A ring and an all-gather move the same bytes, (W-1)/W of
    the candidates into every worker; the ring needs memory for three blocks (its own, and two in transfer)
    where an all-gather needs W, and all but the last transfer overlap with the comparison. So there is no
    all-gather here.

    Args:
        z_nD: this worker's queries. block_mD: this worker's candidates. Either may be empty, and sizes may
            differ between workers. Candidates are numbered consecutively, in the order of the ranks.
    Returns:
        As `nearest`, for this worker's queries.
    Raises:
        UserError: on every worker, where `nearest` would raise it on one.
    """
    check_shapes(z_nD, block_mD)
    if world_size(group) == 1:
        return nearest(z_nD, block_mD)
    sizes = agreed_sizes(z_nD, block_mD, group)
    starts = [sum(sizes[:owner]) for owner in range(len(sizes))]
    search = NearestSearch(z_nD)
    for owner, held_mD in around_the_ring(block_mD, sizes, group):
        search.add(held_mD, starts[owner])
    return search.index_N, search.distance_N


def around_the_ring(
    block_mK: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield every worker's block with its owner's rank, transferring the next one meanwhile."""
    world, own = len(sizes), rank(group)
    travelling = [block_mK.new_empty(max(sizes), block_mK.shape[1]) for _ in range(min(2, world - 1))]
    held_mK = block_mK.contiguous()
    for turn in range(world):
        owner = (own - turn) % world
        coming_mK, transfers = held_mK, []
        if turn < world - 1:
            coming_mK = travelling[turn % 2][: sizes[owner - 1]]
            transfers = _start_transfer(held_mK, coming_mK, group)
        yield owner, held_mK
        for transfer in transfers:
            transfer.wait()
        held_mK = coming_mK


class NearestSearch:
    """Running (distance, index) of each query's nearest candidate, updated with one block of candidates at a time.

    The result does not depend on the order or the sizes of the blocks. Inputs must be finite
    (`nearest` and `ring_nearest` check that).
    """

    def __init__(self, z_ND: Tensor):
        self._z_ND = z_ND.detach()
        self.index_N = torch.full((len(z_ND),), _NO_INDEX, dtype=torch.int64, device=z_ND.device)
        self.distance_N = torch.full((len(z_ND),), math.inf, dtype=torch.float64, device=z_ND.device)
        self.largest = float(self._z_ND.abs().max()) if z_ND.numel() else 0.0
        self.kappa = _gamma(z_ND.shape[1] + 12)
        self._kappa_64 = _gamma(3 * z_ND.shape[1] + 30, 2.0**-53)
        self._eta = z_ND.shape[1] * 2.0**-118

    def add(self, candidates_MD: Tensor, first_index: int) -> None:
        """Compare every query with every candidate; candidate j has the index first_index + j."""
        if not len(self._z_ND) or not len(candidates_MD):
            return
        rows, columns = _tile(candidates_MD.device)
        with torch.no_grad(), _full_precision(candidates_MD.device):
            for at_C in distinct_rows(candidates_MD).split(columns * _GROUP):
                block = _Block(candidates_MD[at_C], at_C + first_index, columns, self)
                for row in range(0, len(self._z_ND), rows * _GROUP):
                    self._compare(row, min(row + rows * _GROUP, len(self._z_ND)), block, rows)

    def _compare(self, start: int, stop: int, block: _Block, rows: int) -> None:
        """Update queries start..stop with a block: bounds of all pairs, then the exact distances of the close ones."""
        z_nD = self._z_ND[start:stop] * block.scale - block.centre_D
        slack_n = z_nD.double().square().sum(dim=1).mul_(self.kappa).add_(self._eta)
        reach_n = slack_n - z_nD.double().square().sum(dim=1)
        query_nE = torch.cat([z_nD.mul_(-2), torch.ones_like(z_nD[:, :1])], dim=1)
        smallest_Tn = _smallest(query_nE, block.tiles_EC, rows)
        favourite_n = smallest_Tn.argmin(dim=0)
        for favourite in (True, False):  # after the favourite tiles, few others can contain a nearer candidate
            limit_n = self.distance_N[start:stop] * block.scale**2 + reach_n
            for number, smallest_n in enumerate(smallest_Tn):
                possible_n = (smallest_n <= limit_n) & ((favourite_n == number) == favourite)
                for row_H in possible_n.nonzero()[:, 0].split(2 * rows):
                    limit_H = limit_n[row_H]
                    self._refine(query_nE[row_H], row_H + start, limit_H, slack_n[row_H], block, number)

    def _refine(
        self, query_HE: Tensor, row_H: Tensor, limit_H: Tensor, slack_H: Tensor, block: _Block, number: int
    ) -> None:
        """Compute the float64 distances of all candidates of a tile that could be as near as the best known."""
        lower_HC = torch.mm(query_HE, block.tiles_EC[number])
        upper_H = (lower_HC + block.lifts_C[number]).amin(dim=1)
        limit_H = torch.minimum(limit_H, upper_H + 2 * slack_H)
        close_HC = lower_HC <= _round_up(limit_H)[:, None]
        row_K, column_K = close_HC.nonzero(as_tuple=True)
        if len(row_K) > _CROWD * len(row_H):
            row_K, column_K = self._separated(close_HC, row_H, block, number).nonzero(as_tuple=True)
        self._measure(row_H[row_K], column_K + number * block.columns, block)

    def _separated(self, close_HC: Tensor, row_H: Tensor, block: _Block, number: int) -> Tensor:
        """Of the pairs close_HC of a tile, those that products in float64 do not separate either."""
        centre_D = block.centre_D.double()
        z_HD = self._z_ND[row_H].double() * block.scale - centre_D
        c_CD = block.c_MD.split(block.columns)[number].double() * block.scale - centre_D
        square_H1, square_C = z_HD.square().sum(dim=1, keepdim=True), c_CD.square().sum(dim=1)
        slack_HC = self._kappa_64 * (square_H1 + 2 * square_C)
        value_HC = torch.addmm(square_C, z_HD, c_CD.T, alpha=-2)
        upper_H1 = torch.where(close_HC, value_HC + slack_HC, math.inf).amin(dim=1, keepdim=True)
        return close_HC & (value_HC - slack_HC <= upper_H1)

    def _measure(self, query_K: Tensor, column_K: Tensor, block: _Block) -> None:
        """Merge pairs into the running minimum by (float64 distance, lowest index)."""
        size = max(1, _EXACT_NUMBERS // block.c_MD.shape[1])
        for query_k, column_k in zip(query_K.split(size), column_K.split(size), strict=True):
            distance_k = squared_distances(self._z_ND[query_k], block.c_MD[column_k])
            self.merge(query_k, block.index_M[column_k], distance_k)

    def merge(self, query_K: Tensor, index_K: Tensor, distance_K: Tensor) -> None:
        """Merge pairs (query, candidate's index, float64 distance) into the result."""
        before_K = self.distance_N[query_K]
        self.distance_N.scatter_reduce_(0, query_K, distance_K, "amin")
        now_K = self.distance_N[query_K]
        # A nearer candidate invalidates the old index; among equals the lowest index wins.
        self.index_N[query_K[now_K < before_K]] = _NO_INDEX
        winner_K = distance_K == now_K
        self.index_N.scatter_reduce_(0, query_K[winner_K], index_K[winner_K], "amin")


class _Block:
    """Candidates prepared for the GEMM: scaled, centred, transposed, with their part of the bound."""

    def __init__(self, c_MD: Tensor, index_M: Tensor, columns: int, search: NearestSearch):
        self.c_MD, self.index_M, self.columns = c_MD, index_M, columns
        self.scale = power_of_two(max(search.largest, float(c_MD.abs().max())))
        self.centre_D = (c_MD * self.scale).mean(dim=0, dtype=torch.float64).float()
        self.tiles_EC, self.lifts_C = [], []
        for c_CD in c_MD.split(columns):
            c_CD = c_CD * self.scale - self.centre_D
            square_C1 = c_CD.double().square().sum(dim=1, keepdim=True)
            # (c, |c|^2 - 2 kappa |c|^2) times (-2z, 1) is the lower bound; the lift makes it the upper one.
            lowered_C1 = (square_C1 * (1 - 2 * search.kappa)).float()
            self.tiles_EC.append(torch.cat([c_CD, lowered_C1], dim=1).t().contiguous())
            self.lifts_C.append(_round_up(4 * search.kappa * square_C1[:, 0]))


def _smallest(query_nE: Tensor, tiles_EC: list[Tensor], rows: int) -> Tensor:
    """The smallest lower bound of every query in every tile, [T, n]: the hot loop, 2 n M D operations.

    A minimum without its index runs at the speed of the cache; `min` with indices is slower by an order of magnitude.
    So the index is found later, where it is needed.
    """
    smallest_Tn = query_nE.new_empty(len(tiles_EC), len(query_nE))
    buffer = query_nE.new_empty(rows * tiles_EC[0].shape[1])
    for at in range(0, len(query_nE), rows):
        query_QE = query_nE[at : at + rows]
        for number, tile_EC in enumerate(tiles_EC):
            bound_QC = buffer[: len(query_QE) * tile_EC.shape[1]].view(len(query_QE), -1)
            torch.mm(query_QE, tile_EC, out=bound_QC)
            torch.amin(bound_QC, dim=1, out=smallest_Tn[number, at : at + rows])
    return smallest_Tn


def squared_distances(a_KD: Tensor, b_KD: Tensor) -> Tensor:
    """Squared Euclidean distances of pairs, float64 [K], summed in a fixed order.

    The order (halves added to halves) does not depend on K, the tile or the device, unlike a library's
    sum. So equal pairs have bitwise equal distances, and ties are ties everywhere.
    """
    square_KD = (a_KD.double() - b_KD.double()).square_()
    width = square_KD.shape[1]
    while width > 1:
        half = (width + 1) // 2
        square_KD[:, : width - half] += square_KD[:, half:width]
        width = half
    return square_KD[:, 0].clone()


def _start_transfer(held_mD: Tensor, coming_mD: Tensor, group: dist.ProcessGroup | None) -> list[dist.Work]:
    """Start sending this block to the next rank and receiving another; empty blocks are not sent."""
    world, own = world_size(group), rank(group)
    peers = [(own + 1) % world, (own - 1) % world]
    if group is not None:
        peers = [dist.get_global_rank(group, peer) for peer in peers]
    transfers = []
    if len(held_mD):
        transfers.append(dist.P2POp(dist.isend, held_mD, peers[0], group))
    if len(coming_mD):
        transfers.append(dist.P2POp(dist.irecv, coming_mD, peers[1], group))
    return dist.batch_isend_irecv(transfers) if transfers else []


def agreed_sizes(z_nD: Tensor, block_mD: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """Collective: every worker's block size; raises UserError on all workers if the input of one is invalid."""
    mine = [len(block_mD), z_nD.shape[1], _unusable(z_nD), _unusable(block_mD)]
    mine_4 = torch.tensor(mine, dtype=torch.int64, device=z_nD.device)
    sizes, dims, bad_queries, bad_candidates = zip(*gather(mine_4, group).tolist(), strict=True)
    for name, counts in (("queries", bad_queries), ("candidates", bad_candidates)):
        for worker, bad in enumerate(counts):
            if bad:
                raise UserError(_not_finite(bad, f"{name} of worker {worker}"))
    if len(set(dims)) > 1:
        raise UserError(f"workers search in codes of different dimensions: {dims}")
    if not sum(sizes):
        raise UserError("there are no candidates to search among; raise imle.candidates")
    return list(sizes)


def check_shapes(z_ND: Tensor, candidates_MD: Tensor) -> None:
    """Refuse what cannot be compared. Raises UserError unless both are float32 [*, D]."""
    if z_ND.ndim != 2 or candidates_MD.ndim != 2 or z_ND.shape[1] != candidates_MD.shape[1] or not z_ND.shape[1]:
        raise UserError(f"cannot compare codes of shapes {tuple(z_ND.shape)} and {tuple(candidates_MD.shape)}")
    if z_ND.dtype != torch.float32 or candidates_MD.dtype != torch.float32:
        raise UserError(f"neighbours are searched among float32 codes, not {z_ND.dtype} and {candidates_MD.dtype}")


def _unusable(x_ND: Tensor) -> int:
    """Count the rows with a NaN or an infinity; a maximum of magnitudes preserves both."""
    return sum(int((~part.abs().amax(dim=1).isfinite()).sum()) for part in x_ND.detach().split(1 << 16) if len(part))


def _not_finite(bad: int, name: str) -> str:
    return f"{bad} of the {name} contain NaN or infinity, so they have no nearest neighbour; the training has diverged"


def _tile(device: torch.device) -> tuple[int, int]:
    if device.type != "cpu":
        return _GPU_TILE
    return _CPU_TILE[0] * min(16, torch.get_num_threads()), _CPU_TILE[1]


def _gamma(n: int, unit: float = _UNIT) -> float:
    return n * unit / (1 - n * unit)


def power_of_two(largest: float) -> float:
    """A power of two that scales numbers up to `largest` into [-1/2, 1/2], within float32's range."""
    return 2.0 ** max(-126, min(126, -math.frexp(largest)[1] - 1)) if largest else 1.0


def _round_up(x_H: Tensor) -> Tensor:
    """Round float64 numbers up to float32."""
    return torch.nextafter(x_H.float(), torch.full_like(x_H, math.inf, dtype=torch.float32))


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32: the bound does not hold for TF32 or bfloat16 tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
