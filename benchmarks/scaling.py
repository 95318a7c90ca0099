"""Time, messages and bytes of a training on W workers, on paper: which term dominates, and where exact search ends.

    python benchmarks/scaling.py [RECIPE] [--gpu NAME] [--measure] [--plots FOLDER]

Counts follow from the algorithms, and a test compares them with what is sent for W up to 16. Rates are constants, each
with its source: measured on CPUs by the other benchmarks (`--measure` measures them here), or data sheets times a share
for GPUs, where nothing was measured. Times are sums of terms of which the overlapping ones count as their maximum.

Legend: N rows, M candidates, W workers, D latent dimension, E noise dimension, P parameters, S steps of an epoch.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from glann.cluster.index_cipher import IndexCipher
from glann.cluster.neighbours import nearest
from glann.config.run import Config, load
from glann.datasets.records import BLOCK_ROWS, RECORD
from glann.models.noise import noise
from glann.samplers.base import build_network
from glann.trainers.plan.costs import training_costs
from glann.trainers.plan.devices import GPUS
from glann.trainers.plan.memory import latent_bytes

FLOAT = 4
ROWS = (30_000, 1_000_000, 100_000_000, 1_000_000_000)
WORKERS = (8, 64, 256, 1024)
PROBES = 16
ROW_TICKS = {10**4: "10,000", 10**5: "100,000", 10**6: "1 M", 10**7: "10 M", 10**8: "100 M", 10**9: "1,000 M"}
TIME_TICKS = {1: "1 s", 60: "1 min", 3600: "1 h", 86400: "1 day", 30 * 86400: "30 days"}


@dataclass(frozen=True)
class Rates:
    """Per worker, in SI units, with their sources in `docs/scaling.md`."""

    train_flops: float  # of generator and loss
    search_flops: float  # of the exact search
    candidates_per_s: float  # noise made and mapped
    step_s: float  # of stage 2, without the all-reduce
    decoded_per_s: float  # images
    read_bytes_per_s: float  # from shared storage
    link_bytes_per_s: float  # between workers
    latency_s: float  # of a message
    order_s_per_row: float  # of an epoch of stage 2
    dollars_per_hour: float


@dataclass(frozen=True)
class Sizes:
    """What a recipe fixes; numbers are per row unless they say otherwise."""

    flops: float
    parameters: int  # of the generator
    mapping_parameters: int
    dim: int
    noise_dim: int
    candidates: float
    batch_per_worker: int  # of stage 1
    batch: int  # of stage 2, over all workers, where that makes no more steps than:
    most_steps: float  # of an epoch of stage 2
    image_bytes: int
    workers_per_node: int


@dataclass(frozen=True)
class Counts:
    """Of one worker in one epoch: messages that it sends, and bytes in them, by purpose."""

    steps: int
    messages: dict[str, int]
    sent: dict[str, float]


def sizes_of(config: Config) -> Sizes:
    """The sizes of a recipe; its global batch is taken as that of 8 workers."""
    generator, loss = training_costs(config)
    with torch.device("meta"):
        mapping = build_network(config.sampler, config.generator.latent_dim, config.glo.constraint)
    keys = config.sampler
    return Sizes(
        flops=float(generator.flops + loss.flops),
        parameters=generator.parameters,
        mapping_parameters=sum(parameter.numel() for parameter in mapping.parameters()),
        dim=config.generator.latent_dim,
        noise_dim=getattr(keys, "noise_dim", config.generator.latent_dim),
        candidates=getattr(keys, "candidates", 2.0),
        batch_per_worker=max(1, config.glo.batch_size // 8),
        batch=getattr(keys, "batch_size", 128),
        most_steps=getattr(keys, "max_steps_per_epoch", None) or math.inf,
        image_bytes=config.data.resolution**2 // 2,  # JPEG; 513 kB at 1024 px
        workers_per_node=8,
    )


# Counts --------------------------------------------------------------------------------------


def stage_one_counts(sizes: Sizes, rows: int, workers: int) -> Counts:
    """An all-reduce of the gradients (a ring sends 2 (W - 1) / W of them), two of a few numbers, and one call to the
    table, which answers with the codes of a later batch."""
    steps = math.ceil(rows / (sizes.batch_per_worker * workers))
    ring = 2 * (workers - 1) / workers
    code_bytes = FLOAT * sizes.dim * sizes.batch_per_worker
    return Counts(
        steps,
        {"all-reduce": 3 * steps, "table": steps},
        {"gradients": steps * ring * FLOAT * sizes.parameters, "codes": 2 * steps * code_bytes},
    )


def stage_two_counts(sizes: Sizes, rows: int, workers: int) -> Counts:
    """W - 1 blocks of candidates around the ring, and an all-reduce a step, with one more at the end of the epoch."""
    steps = math.ceil(rows / max(sizes.batch, math.ceil(rows / sizes.most_steps)))
    block = sizes.candidates * rows / workers * FLOAT * sizes.dim
    ring = 2 * (workers - 1) / workers
    return Counts(
        steps,
        {"blocks": workers - 1, "all-reduce": steps + 1},
        {"candidates": (workers - 1) * block, "gradients": steps * ring * FLOAT * sizes.mapping_parameters},
    )


def node_bytes(config: Config, sizes: Sizes, rows: int, workers: int) -> dict[str, float]:
    """Main memory of a node, by purpose."""
    own = math.ceil(rows / workers)
    blocks = (own + BLOCK_ROWS - 1) // BLOCK_ROWS + 1 if rows > BLOCK_ROWS else 1
    index = min(rows, blocks * BLOCK_ROWS) * RECORD.itemsize
    return {
        "latent table": float(latent_bytes(config, own) * sizes.workers_per_node),
        "index": float(index * sizes.workers_per_node),
    }


# Times ---------------------------------------------------------------------------------------


def stage_one(sizes: Sizes, rates: Rates, rows: int, workers: int) -> dict[str, float]:
    """Seconds of an epoch by term; the terms that overlap with the computation hide behind it."""
    counts, own = stage_one_counts(sizes, rows, workers), rows / workers
    return {
        "computation": own * sizes.flops / rates.train_flops,
        "gradients": counts.sent["gradients"] / rates.link_bytes_per_s
        + counts.messages["all-reduce"] * rates.latency_s * math.log2(max(workers, 2)),
        "decoding (overlaps)": own / rates.decoded_per_s,
        "reading (overlaps)": own * sizes.image_bytes / rates.read_bytes_per_s,
    }


def stage_two(sizes: Sizes, rates: Rates, rows: int, workers: int, approximate: bool = False) -> dict[str, float]:
    """Seconds of an epoch by term."""
    counts, own, number = stage_two_counts(sizes, rows, workers), rows / workers, sizes.candidates * rows
    pairs = own * number
    if approximate:
        cells = 4 * math.sqrt(number)
        pairs = own * (cells + number * PROBES / cells) + number / workers * cells
    return {
        "search": 2 * pairs * sizes.dim / rates.search_flops,
        "candidates": number / workers / rates.candidates_per_s,
        "blocks (overlap)": counts.sent["candidates"] / rates.link_bytes_per_s + (workers - 1) * rates.latency_s,
        "steps": counts.steps * (rates.step_s + rates.latency_s * math.log2(max(workers, 2))),
        "order": own * rates.order_s_per_row,
    }


def seconds(terms: dict[str, float]) -> float:
    """The sum of the terms, of which those that overlap count where they are longer than all others."""
    hidden = [value for name, value in terms.items() if "overlap" in name]
    return max(sum(value for name, value in terms.items() if "overlap" not in name), *hidden)


def dominant(terms: dict[str, float]) -> str:
    return max(terms, key=lambda name: terms[name])


def exact_pays_until(sizes: Sizes, rates: Rates, workers: int) -> int:
    """The largest N at which an epoch of exact search takes no longer than an epoch of stage 1, to two digits."""
    low, high = 1e3, 1e13
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        search = stage_two(sizes, rates, int(middle), workers)["search"]
        low, high = (middle, high) if search < seconds(stage_one(sizes, rates, int(middle), workers)) else (low, middle)
    return int(float(f"{low:.1e}"))


# Rates ---------------------------------------------------------------------------------------


def gpu_rates(name: str) -> Rates:
    """A GPU by its data sheet: 30 % of the bf16 peak for training, 60 % of the float32 peak for the search. Assumed."""
    gpu = next(gpu for gpu in GPUS if gpu.name == name)
    return Rates(
        train_flops=0.3 * gpu.bf16 * 1e12,
        search_flops=0.6 * gpu.fp32 * 1e12,
        candidates_per_s=2e7,
        step_s=1.5e-3,
        decoded_per_s=8 * 200.0,
        read_bytes_per_s=1.0e9,
        link_bytes_per_s=40e9,
        latency_s=20e-6,
        order_s_per_row=1.5e-7,
        dollars_per_hour=4.0,
    )


def measured_here(rates: Rates, dim: int, noise_dim: int) -> Rates:
    """The rates that one thread of this machine can tell, in place of those of a GPU."""
    torch.set_num_threads(1)
    z_ND, c_MD = torch.randn(4_000, dim), torch.randn(8_000, dim)
    searched = best_of(lambda: nearest(z_ND, c_MD))
    rows = np.arange(200_000)
    made = best_of(lambda: noise(0, 0, torch.arange(50_000), noise_dim))
    ordered = best_of(lambda: IndexCipher(100_000_000, 1).places(rows))
    return replace(
        rates,
        search_flops=2.0 * len(z_ND) * len(c_MD) * dim / searched,
        candidates_per_s=50_000 / made,
        order_s_per_row=ordered / len(rows),
    )


def best_of(call, repeats: int = 3) -> float:  # type: ignore[no-untyped-def]
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


# Output --------------------------------------------------------------------------------------


def table(config: Config, sizes: Sizes, rates: Rates) -> list[str]:
    """A table in Markdown: an epoch of both stages for every N and W."""
    lines = [
        "| N | W | stage 1 | dominated by | stage 2, exact | dominated by | stage 2, ivf | a node | dollars |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in ROWS:
        for workers in WORKERS:
            one, two = stage_one(sizes, rates, rows, workers), stage_two(sizes, rates, rows, workers)
            ivf = stage_two(sizes, rates, rows, workers, approximate=True)
            memory = sum(node_bytes(config, sizes, rows, workers).values())
            dollars = (seconds(one) + min(seconds(two), seconds(ivf))) * workers * rates.dollars_per_hour / 3600
            lines.append(
                f"| {rows:,} | {workers:,} | {duration(seconds(one))} | {dominant(one)} | {duration(seconds(two))} | "
                f"{dominant(two)} | {duration(seconds(ivf))} | {memory / 1e9:,.1f} GB | {dollars:,.2f} |"
            )
    return lines


def duration(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:,.1f} h"


def plots(sizes: Sizes, rates: Rates, folder: Path) -> None:
    """`scaling-stage-1.svg` and `scaling-stage-2.svg`: time of an epoch over N, a line for every W."""
    from glann.reports.charts import drawing

    folder.mkdir(parents=True, exist_ok=True)
    rows = [int(10**exponent) for exponent in np.arange(4, 9.26, 0.25)]
    for number, stage in ((1, stage_one), (2, stage_two)):

        def draw(figure, stage=stage, number=number) -> None:  # type: ignore[no-untyped-def]
            axes = figure.add_subplot()
            for workers in WORKERS:
                axes.plot(rows, [seconds(stage(sizes, rates, n, workers)) for n in rows], label=f"W = {workers:,}")
            axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="an epoch takes")
            axes.set_xticks(list(ROW_TICKS), labels=list(ROW_TICKS.values()))
            axes.set_yticks(list(TIME_TICKS), labels=list(TIME_TICKS.values()))
            axes.minorticks_off()
            axes.set_title(f"stage {number}", loc="left")
            axes.legend(frameon=False)
            axes.grid(alpha=0.2)

        svg = drawing(f"scaling of stage {number}", (6.4, 3.6), draw).replace("currentColor", "#777")
        (folder / f"scaling-stage-{number}.svg").write_text(str(svg).replace("<svg ", '<svg width="640" ', 1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="celebahq-1024", help="sizes of networks and codes")
    parser.add_argument("--gpu", default="H100 SXM", choices=[gpu.name for gpu in GPUS], help="data sheet")
    parser.add_argument("--measure", action="store_true", help="measure what one thread of this machine can tell")
    parser.add_argument("--plots", type=Path, help="folder for pictures")
    options = parser.parse_args()
    config = load(options.recipe, [])
    sizes, rates = sizes_of(config), gpu_rates(options.gpu)
    if options.measure:
        here = measured_here(rates, sizes.dim, sizes.noise_dim)
        print("one thread of this machine, and what the table takes for a GPU:")
        print(f"  exact search    {here.search_flops / 1e9:9,.0f} GFLOP/s  {rates.search_flops / 1e9:9,.0f}")
        print(f"  noise           {here.candidates_per_s / 1e6:9.2f} M rows/s {rates.candidates_per_s / 1e6:9.2f}")
        print(f"  epoch's order   {1e9 * here.order_s_per_row:9.0f} ns a row {1e9 * rates.order_s_per_row:9.0f}\n")
    print("\n".join(table(config, sizes, rates)))
    print()
    for workers in WORKERS:
        until = exact_pays_until(sizes, rates, workers)
        print(f"W = {workers:,}: exact search takes less than stage 1 up to N = {until:,}")
    if options.plots:
        plots(sizes, rates, options.plots)


if __name__ == "__main__":
    main()
