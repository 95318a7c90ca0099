"""Updating the codes of one batch among N: the row-sparse table against dense Adam and torch.optim.SparseAdam.

    python benchmarks/latents.py [--rows N --dim D --batch B --threads T --repeats R]

Every side updates the same number of random rows from a gradient that is there already; the median of the repeats
counts, taken in turns. Ours also projects to the sphere and checks the gradient, the others do neither. The last
lines show what a training step notices when the table is an actor on the same node.
Legend: N rows, B rows of a batch, D dimension.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from glann.cluster.latent_shard import LatentShard
from glann.cluster.latents import LatentTable
from harness import Row, least
from torch import Tensor


def ours(options: argparse.Namespace, optimizer: Literal["adam", "adagrad"]) -> Callable[[np.ndarray, Tensor], None]:
    shard = LatentShard(range(options.rows), options.dim, 0, optimizer)
    steps = iter(range(1 << 40))

    def update(rows_B: np.ndarray, grad_BD: Tensor) -> None:
        shard.apply(0, next(steps), rows_B, grad_BD.numpy(), 0.01)

    return update


def sparse_adam(options: argparse.Namespace) -> Callable[[np.ndarray, Tensor], None]:
    z_ND = torch.randn(options.rows, options.dim)
    optimizer = torch.optim.SparseAdam([z_ND], lr=0.01, betas=(0.5, 0.999))

    def update(rows_B: np.ndarray, grad_BD: Tensor) -> None:
        at_1B = torch.from_numpy(rows_B)[None]
        z_ND.grad = torch.sparse_coo_tensor(at_1B, grad_BD, z_ND.shape, check_invariants=False)
        optimizer.step()

    return update


def dense_adam(options: argparse.Namespace) -> Callable[[np.ndarray, Tensor], None]:
    z_ND = torch.randn(options.rows, options.dim)
    dense_ND = torch.zeros_like(z_ND)
    z_ND.grad = dense_ND
    optimizer = torch.optim.Adam([z_ND], lr=0.01, betas=(0.5, 0.999))

    def update(rows_B: np.ndarray, grad_BD: Tensor) -> None:
        at_B = torch.from_numpy(rows_B)
        dense_ND[at_B] = grad_BD
        optimizer.step()
        dense_ND[at_B] = 0

    return update


SIDES = {"ours": lambda options: ours(options, "adam"), "theirs": sparse_adam}


def batches(options: argparse.Namespace, count: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        rows_B = rng.choice(options.rows, options.batch, replace=False)
        yield rows_B, torch.randn(options.batch, options.dim)


def in_turns(options: argparse.Namespace) -> None:
    updates = {
        "ours, Adam": ours(options, "adam"),
        "ours, Adagrad": ours(options, "adagrad"),
        "torch SparseAdam": sparse_adam(options),
        "torch dense Adam": dense_adam(options),
    }
    taken: dict[str, list[float]] = {name: [] for name in updates}
    for rows_B, grad_BD in batches(options, options.repeats + 2):
        for name, update in updates.items():
            start = time.perf_counter()
            update(rows_B, grad_BD)
            taken[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[2:]) for name, times in taken.items()}
    print(f"N={options.rows} D={options.dim} B={options.batch}, {options.threads} threads")
    for name, median in medians.items():
        print(f"  {name:18s} {1e3 * median:9.3f} ms   {median / medians['ours, Adam']:7.2f} x ours")


def rows(threads: int = 1, repeats: int = 60) -> list[Row]:
    """Rows of `bench.py`."""
    torch.set_num_threads(threads)
    few = argparse.Namespace(rows=200_000, dim=64, batch=128, threads=threads, repeats=repeats)
    taken = least({name: on_batches(make(few), few) for name, make in SIDES.items()}, repeats)
    work = "update of 128 codes of 64 among 200,000, one thread"
    found = [Row(work, "torch SparseAdam", taken["theirs"], taken["ours"], "s")]
    sizes = (50_000, 1_280_000, 10_000_000)
    shards = {n: argparse.Namespace(rows=n, dim=16, batch=128, threads=threads, repeats=repeats) for n in sizes}
    taken_N = least({str(n): on_batches(gather_and_apply(some), some) for n, some in shards.items()}, repeats)
    for n in sizes[1:]:
        work = f"gather and update of 128 codes of 16 among {n:,}"
        found.append(Row(work, f"among {sizes[0]:,}", taken_N[str(sizes[0])], taken_N[str(n)], "s", round(1 / 1.2, 2)))
    for step_s, share in ((0.01, 0.1), (0.05, 0.03)):
        few.repeats = 40
        wait = waits(few, step_s)[1]
        work = f"a step of {1e3 * step_s:.0f} ms, waiting for its table"
        found.append(Row(work, f"aim, {share:.0%}", share * step_s, wait, "s"))
    return found


def on_batches(update: Callable[[np.ndarray, Tensor], None], options: argparse.Namespace) -> Callable[[], None]:
    """The update of the next of some batches that are there already."""
    plan = batches(options, options.repeats + 1)
    ready = iter(list(plan))
    return lambda: update(*next(ready))


def gather_and_apply(options: argparse.Namespace) -> Callable[[np.ndarray, Tensor], None]:
    shard, steps = LatentShard(range(options.rows), options.dim, 0), iter(range(1 << 40))

    def update(rows_B: np.ndarray, grad_BD: Tensor) -> None:
        shard.gather(rows_B)
        shard.apply(0, next(steps), rows_B, grad_BD.numpy(), 0.01)

    return update


def behind_a_step(options: argparse.Namespace) -> None:
    """Print what gather, prefetch and apply cost a worker whose step lasts 50 ms."""
    apart, together = waits(options, 0.05)
    for name, wait in (("in calls of their own", apart), ("gathered with an update", together)):
        print(f"  as an actor, behind a 50 ms step, codes {name}: {1e3 * wait:.2f} ms, {100 * wait / 0.05:.1f}% of it")


def waits(options: argparse.Namespace, step_s: float) -> tuple[float, float]:
    """Seconds that a worker waits in a step for its table, an actor: with codes asked for apart, and with an update."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    table = LatentTable.spawn(range(options.rows), options.dim, 0)
    plan = list(batches(options, options.repeats + 2))
    apart, together = (waited(table, plan, step_s, number) for number in range(2))
    ray.shutdown()
    return apart, together


def waited(table: LatentTable, plan: list[tuple[np.ndarray, Tensor]], step_s: float, together: int) -> float:
    """The median wait over the steps of a plan. together: 1 if codes are gathered with an update."""
    taken = []
    for step, (rows_B, grad_BD) in enumerate(plan):
        ahead_B = [one[0] for one in plan[step + 1 : step + 3]]
        start = time.perf_counter()
        table.gather(rows_B)
        if not together and ahead_B:
            table.prefetch(ahead_B[0])
        waiting = time.perf_counter() - start
        time.sleep(step_s)  # the training step, which computes elsewhere
        start = time.perf_counter()
        after_next_B = ahead_B[1] if together and len(ahead_B) == 2 else None
        table.apply(together, step, rows_B, grad_BD, 0.01, ahead_B=after_next_B)
        taken.append(waiting + time.perf_counter() - start)
    table.flush()
    return statistics.median(taken[2:-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    in_turns(options)
    behind_a_step(options)


if __name__ == "__main__":
    main()
