"""Exact nearest neighbours: ours against faiss (flat index) and torch (addmm + min), in one run.

    python benchmarks/neighbours.py [--queries N --candidates M --threads T --repeats R]
    python benchmarks/neighbours.py --collapsed

All three search the same unit vectors on the CPU; the fastest of the repeats counts, taken in turns so that a busy
machine is busy for all. Only ours is certified to equal brute force in float64; the others' disagreements are
counted. With --collapsed, ours alone: among the candidates of mappings that have collapsed, against candidates that
are spread over the sphere. Legend: N queries, M candidates, D dimension.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import faiss
import torch
from glann.cluster.neighbours import nearest
from harness import Row, least
from torch import Tensor


def torch_search(z_ND: Tensor, c_MD: Tensor, tile: int = 4096) -> Tensor:
    """The usual tiled search in torch: one GEMM with the norms added, then min with indices."""
    square_M = c_MD.square().sum(dim=1)
    best_N = z_ND.new_full((len(z_ND),), torch.inf)
    index_N = torch.zeros(len(z_ND), dtype=torch.int64)
    for start in range(0, len(c_MD), tile):
        part_MD = c_MD[start : start + tile]
        value_N, at_N = torch.addmm(square_M[start : start + tile], z_ND, part_MD.T, alpha=-2).min(dim=1)
        nearer_N = value_N < best_N
        best_N = torch.where(nearer_N, value_N, best_N)
        index_N = torch.where(nearer_N, at_N + start, index_N)
    return index_N


def our_search(z_ND: Tensor, c_MD: Tensor) -> Tensor:
    return nearest(z_ND, c_MD)[0]


def faiss_search(z_ND: Tensor, c_MD: Tensor) -> Tensor:
    index = faiss.IndexFlatL2(c_MD.shape[1])
    index.add(c_MD.numpy())
    return torch.from_numpy(index.search(z_ND.numpy(), 1)[1][:, 0])


def collapsed(candidates: int, d: int) -> dict[str, Tensor]:
    """Candidates spread over the sphere, and what mappings make whose units have died or nearly so."""
    spread_MD = torch.nn.functional.normalize(torch.randn(candidates, d), dim=1)
    few_MD = spread_MD[torch.randint(20, (candidates,))]
    near = {f"within {size:.0e}": spread_MD[:1] + size * torch.randn(candidates, d) for size in (1e-5, 1e-6, 1e-7)}
    return {"spread": spread_MD, "20 points": few_MD, "all equal": spread_MD[:1].repeat(candidates, 1)} | near


def compare_collapsed(options: argparse.Namespace) -> None:
    for d in options.dims:
        z_ND = torch.nn.functional.normalize(torch.randn(options.queries, d), dim=1)
        print(f"N={options.queries} M={options.candidates} D={d}, {options.threads} threads; ours by candidates")
        kinds = collapsed(options.candidates, d)
        best = dict.fromkeys(kinds, torch.inf)
        for _ in range(options.repeats):
            for name, c_MD in kinds.items():
                best[name] = min(best[name], seconds(partial(our_search, z_ND, c_MD))[0])
        for name, taken in best.items():
            print(f"  {name:16s} {taken:7.3f} s   {taken / best['spread']:5.2f} x spread")


def seconds(search: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found_N = search()
    return time.perf_counter() - start, found_N


def compare_searches(options: argparse.Namespace) -> None:
    for d in options.dims:
        z_ND = torch.nn.functional.normalize(torch.randn(options.queries, d), dim=1)
        c_MD = torch.nn.functional.normalize(torch.randn(options.candidates, d), dim=1)
        searches: dict[str, Callable[[], Tensor]] = {
            "ours": partial(our_search, z_ND, c_MD),
            "faiss flat": partial(faiss_search, z_ND, c_MD),
            "torch addmm+min": partial(torch_search, z_ND, c_MD),
        }
        best = dict.fromkeys(searches, torch.inf)
        found: dict[str, Tensor] = {}
        for _ in range(options.repeats):
            for name, search in searches.items():
                taken, found[name] = seconds(search)
                best[name] = min(best[name], taken)
        rate = 2 * options.queries * options.candidates * d / best["ours"] / 1e9
        print(f"N={options.queries} M={options.candidates} D={d}, {options.threads} threads; ours: {rate:.0f} GFLOP/s")
        for name, taken in best.items():
            wrong = int((found[name] != found["ours"]).sum())
            print(f"  {name:16s} {taken:7.3f} s   {taken / best['ours']:5.2f} x ours   {wrong} answers differ")


def rows(queries: int = 10_000, candidates: int = 20_000, threads: int = 2, repeats: int = 3) -> list[Row]:
    """Rows of `bench.py`. The bars are the ratios of the first measurement, to be kept."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    torch.manual_seed(0)
    found = []
    for d, bar in ((64, 2.8), (256, 4.4)):
        z_ND = torch.nn.functional.normalize(torch.randn(queries, d), dim=1)
        c_MD = torch.nn.functional.normalize(torch.randn(candidates, d), dim=1)
        sides = {"ours": partial(our_search, z_ND, c_MD), "faiss": partial(faiss_search, z_ND, c_MD)}
        taken = least(sides, repeats)
        rate = 2 * queries * candidates * d / taken["ours"] / 1e9
        work = f"exact search, {queries:,} x {candidates:,}, d = {d}, {threads} threads"
        found.append(Row(work, "faiss flat", taken["faiss"], taken["ours"], "s", bar, f"{rate:.0f} GFLOP/s"))
    spread_MD, equal_MD = collapsed(4000, 64)["spread"], collapsed(4000, 64)["all equal"]
    sides = {"spread": partial(our_search, spread_MD, spread_MD), "equal": partial(our_search, spread_MD, equal_MD)}
    taken = least(sides, repeats)
    work = "exact search among equal candidates, 4,000 x 4,000, d = 64"
    return [*found, Row(work, "spread candidates", taken["spread"], taken["equal"], "s")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=20_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--collapsed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    torch.manual_seed(0)
    (compare_collapsed if options.collapsed else compare_searches)(options)


if __name__ == "__main__":
    main()
