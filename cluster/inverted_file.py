"""Approximate nearest neighbours by an inverted file (IVF), for tables where comparing all pairs is too slow.

Candidates are sorted into cells around C centroids, and a query is compared with those of its `probes`
nearest cells alone: about probes / C of all pairs (Sivic & Zisserman 2003; Jegou, Douze & Schmid 2011,
section IV). The recall is measured, not assumed: a sample of the queries is searched exactly too.

Every query finds a candidate: a cell that holds no candidate of any worker is left out before the nearest cells are
chosen. Equal candidates are searched once, or a mapping that has collapsed would put all of them into one cell.

Legend: n queries and m candidates of this worker, u its distinct candidates, D dimension, C cells, P probes, W workers,
S a sample, q and k the queries and candidates of one cell, K = D + 1.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.comm import all_sum, broadcast, gather, rank
from .distinct import distinct_rows
from .neighbours import (
    NearestSearch,
    agreed_sizes,
    around_the_ring,
    check_shapes,
    power_of_two,
    ring_nearest,
    squared_distances,
)

LLOYD_STEPS = 8
PER_CENTROID = 64  # candidates per centroid that the centroids are fitted to; more hardly move them
SAMPLE = 256  # queries of a worker that recall is measured on
CHUNK = 8192


def ivf_nearest(
    z_nD: Tensor, block_mD: Tensor, cells: int | None, probes: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, float]:
    """Collective: as `ring_nearest`, but only among the candidates in each query's nearest cells.

    Args:
        cells: C; None means 4 sqrt(M). probes: cells searched per query; higher recall, slower.
    Returns:
        index_n, distance_n (squared, float64, of the candidate found), and the recall: the fraction of a sample of
        all workers' queries whose exact nearest distance was found.
    Raises:
        UserError: on every worker, as `ring_nearest`.
    """
    check_shapes(z_nD, block_mD)
    sizes = agreed_sizes(z_nD, block_mD, group)
    starts = [sum(sizes[:owner]) for owner in range(len(sizes))]
    first_u = distinct_rows(block_mD)
    block_uD = block_mD[first_u]
    distinct = gather(torch.tensor([len(block_uD)], device=z_nD.device), group)[:, 0].tolist()
    scale = _shared_scale(z_nD, block_uD, group)
    query_nD = z_nD * scale
    wanted = cells or round(4 * math.sqrt(sum(sizes)))
    centroid_CD = _shared_centroids(block_uD * scale, wanted, distinct, group)
    cell_u = _nearest_cells(block_uD * scale, centroid_CD, 1)[:, 0]
    counts_WC = gather(cell_u.bincount(minlength=len(centroid_CD)), group)
    held_C = counts_WC.sum(0) > 0
    order_u = cell_u.sort(stable=True).indices  # leaving out empty cells does not change it
    query_by_cell = _by_cell(_nearest_cells(query_nD, centroid_CD[held_C], probes), int(held_C.sum()))
    # Each candidate carries its position in its owner's block, as the bits of one more number.
    place_u1 = first_u[order_u].to(torch.int32).view(torch.float32)[:, None]
    search = NearestSearch(z_nD)
    for owner, held_uK in around_the_ring(torch.cat([block_uD[order_u], place_u1], dim=1), distinct, group):
        candidates_uD = held_uK[:, :-1].contiguous()
        index_u = held_uK[:, -1].contiguous().view(torch.int32).long() + starts[owner]
        best_n = _best_in_cells(query_nD, candidates_uD * scale, query_by_cell, counts_WC[owner, held_C])
        query_n = (best_n >= 0).nonzero()[:, 0]
        best_n = best_n[query_n]
        search.merge(query_n, index_u[best_n], squared_distances(z_nD[query_n], candidates_uD[best_n]))
    return search.index_N, search.distance_N, _recall(search, z_nD, block_uD, group)


def _best_in_cells(z_nD: Tensor, candidates_mD: Tensor, query_by_cell: tuple[Tensor, ...], counts_C: Tensor) -> Tensor:
    """Each query's nearest candidate in its cells, by float32; -1 if these are empty."""
    square_m = candidates_mD.square().sum(1)
    smallest_n = z_nD.new_full((len(z_nD),), math.inf)
    best_n = torch.full((len(z_nD),), -1, device=z_nD.device)
    start = 0
    for at_q, count in zip(query_by_cell, counts_C.tolist(), strict=True):
        stop = start + count
        for at in at_q.split(CHUNK) if count else ():
            value_qk = torch.addmm(square_m[start:stop], z_nD[at], candidates_mD[start:stop].T, alpha=-2)
            value_q, place_q = value_qk.min(1)
            nearer_q = value_q < smallest_n[at]
            smallest_n[at] = torch.where(nearer_q, value_q, smallest_n[at])
            best_n[at] = torch.where(nearer_q, place_q + start, best_n[at])
        start = stop
    return best_n


def sample_rows(rows: int, device: torch.device) -> Tensor:
    """Up to `SAMPLE` of `rows` rows, evenly spread from the first to the last; in integers, exact for any number."""
    wanted = min(SAMPLE, rows)
    return torch.arange(wanted, device=device) * (rows - 1) // max(wanted - 1, 1)


def _recall(search: NearestSearch, z_nD: Tensor, block_mD: Tensor, group: dist.ProcessGroup | None) -> float:
    rows_S = sample_rows(len(z_nD), z_nD.device)
    _, exact_S = ring_nearest(z_nD[rows_S], block_mD, group)
    found = torch.stack([(search.distance_N[rows_S] <= exact_S).sum(), torch.tensor(len(rows_S), device=z_nD.device)])
    all_sum(found, group)
    return float(found[0] / found[1]) if found[1] else 1.0


def _shared_scale(z_nD: Tensor, block_mD: Tensor, group: dist.ProcessGroup | None) -> float:
    """Collective: a power of two by which no square of any worker's numbers overflows."""
    largest = torch.stack([x.abs().amax() if x.numel() else x.new_zeros(()) for x in (z_nD, block_mD)]).amax(0, True)
    return power_of_two(float(gather(largest, group).amax()))


def _shared_centroids(block_mD: Tensor, wanted: int, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Collective: k-means centroids of the largest block, broadcast by its owner.

    One block represents all of them: candidates are mapped from independent noise and assigned by index.
    """
    owner = sizes.index(max(sizes))
    cells = min(wanted, sizes[owner])
    centroid_CD = block_mD.new_empty(cells, block_mD.shape[1])
    if rank(group) == owner:
        centroid_CD = _centroids(block_mD[: PER_CENTROID * cells], cells)
    return broadcast(centroid_CD, owner, group)


def _centroids(sample_mD: Tensor, cells: int) -> Tensor:
    """Lloyd's k-means from the first points; a cell that loses all its points keeps its centroid."""
    centroid_CD = sample_mD[:cells].clone()
    for _ in range(LLOYD_STEPS):
        cell_m = _nearest_cells(sample_mD, centroid_CD, 1)[:, 0]
        sum_CD = torch.zeros_like(centroid_CD).index_add_(0, cell_m, sample_mD)
        count_C1 = cell_m.bincount(minlength=cells)[:, None]
        centroid_CD = torch.where(count_C1 > 0, sum_CD / count_C1.clamp(min=1), centroid_CD)
    return centroid_CD


def _nearest_cells(x_nD: Tensor, centroid_CD: Tensor, probes: int) -> Tensor:
    """The numbers of the `probes` nearest cells of every point, or of all cells if there are fewer, [n, P]."""
    probes = min(probes, len(centroid_CD))
    square_C = centroid_CD.square().sum(1)
    cells_nP = [
        torch.addmm(square_C, part_nD, centroid_CD.T, alpha=-2).topk(probes, dim=1, largest=False).indices
        for part_nD in x_nD.split(CHUNK)
        if len(part_nD)
    ]
    return torch.cat(cells_nP) if cells_nP else torch.empty(0, probes, dtype=torch.int64, device=x_nD.device)


def _by_cell(cells_nP: Tensor, cells: int) -> tuple[Tensor, ...]:
    """For every cell, the queries that search it."""
    flat = cells_nP.flatten()
    query = flat.sort(stable=True).indices // cells_nP.shape[1]
    return query.split(flat.bincount(minlength=cells).tolist())
