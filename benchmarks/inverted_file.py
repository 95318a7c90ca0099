"""Approximate nearest neighbours: our inverted file against faiss's and our exact search, in one run.

    python benchmarks/inverted_file.py [--queries N --candidates M --dim D --cells C --probes P --threads T]

All search the same codes of a mixture on the CPU, once, since building the cells is part of the work; recall is the
share of queries with nothing nearer than what was found. Legend: N queries, M candidates, D dimension.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import faiss
import torch
from glann.cluster.inverted_file import ivf_nearest
from glann.cluster.neighbours import nearest
from torch import Tensor


def clustered(rows: int, centre_KD: Tensor) -> Tensor:
    """Unit vectors around shared centres, as trained codes and mapped noise are."""
    own = torch.randint(len(centre_KD), (rows,))
    return torch.nn.functional.normalize(centre_KD[own] + 0.5 * torch.randn(rows, centre_KD.shape[1]), dim=1)


def faiss_search(z_ND: Tensor, c_MD: Tensor, cells: int, probes: int) -> Tensor:
    quantizer = faiss.IndexFlatL2(c_MD.shape[1])
    index = faiss.IndexIVFFlat(quantizer, c_MD.shape[1], cells)
    index.train(c_MD[: 64 * cells].numpy())
    index.add(c_MD.numpy())
    index.nprobe = probes
    return torch.from_numpy(index.search(z_ND.numpy(), 1)[1][:, 0])


def timed(search: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found_N = search()
    return time.perf_counter() - start, found_N


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--cells", type=int, default=512)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    torch.manual_seed(0)
    centre_KD = torch.randn(1000, options.dim) / options.dim**0.5
    z_ND, c_MD = clustered(options.queries, centre_KD), clustered(options.candidates, centre_KD)
    searches: dict[str, Callable[[], Tensor]] = {
        "ours, exact": lambda: nearest(z_ND, c_MD)[0],
        "ours, ivf": lambda: ivf_nearest(z_ND, c_MD, options.cells, options.probes)[0],
        "faiss, ivf": lambda: faiss_search(z_ND, c_MD, options.cells, options.probes),
    }
    taken, found = {}, {}
    for name, search in searches.items():
        taken[name], found[name] = timed(search)
    print(f"N={options.queries} M={options.candidates} D={options.dim}, {options.cells} cells, {options.probes} probes")
    for name, seconds in taken.items():
        recall = (found[name] == found["ours, exact"]).double().mean()
        print(f"  {name:12s} {seconds:7.3f} s   {seconds / taken['ours, ivf']:5.2f} x ours, ivf   recall {recall:.4f}")


if __name__ == "__main__":
    main()
