"""Every sampler on one and the same set of codes, in one run: time, precision, recall and copying, beside `imle`.

    python benchmarks/samplers.py [RUN] [--kinds "gmm" "flow coupling=minibatch" ...] [--seeds 3] [--rows N --dim D]

RUN is a finished run, whose codes are taken; without it they are synthetic: on the unit sphere, in groups. A fifth of
them is held out. Every sampler is fitted to the others, in this process, and draws 2,000 codes; with RUN its generator
makes images of them, for the Fréchet distance to the held-out images of the run's data (to the training images where
none are held out). The rows `held-out codes` and `training codes` are what a perfect sampler, and one that copies,
would get. In brackets: the figure over that of `imle`, the paper's sampler.

Columns: precision and recall in code space against held-out codes (k = 3, Kynkäänniemi et al. 2019); copying, how often
a draw lies nearer to a code of the fit than these lie to one another (0.5 is no preference, 1 is copies); CPU seconds
of the fit, and of 1,000 draws.

Legend: N codes, H held-out codes, B draws, D latent dimension.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from codes import kept, synthetic
from glann.config.samplers import SAMPLERS
from glann.inference.package import load_model
from glann.metrics.copying import copying_of_codes
from glann.metrics.judge import channels_first
from glann.metrics.manifold import compare_manifolds
from glann.metrics.panel import build_panel
from glann.metrics.reference import BATCH
from glann.metrics.spec import frechet_metric
from glann.metrics.tally import KeptFeatures
from glann.models.noise import Stream, noise, stream_of
from glann.models.sphere import Constraint
from glann.reports.run_folder import read_config
from glann.samplers.base import Codes, build_sampler
from glann.trainers.run.local import load_stage_one
from torch import Tensor

DRAWN = 2000
PAPER = "imle"
ALL = [
    PAPER,
    "gaussian",
    "gmm",
    "rs-imle",
    "adaptive-imle",
    "ot",
    "ot extension=none",
    "flow",
    "flow coupling=minibatch",
    "flow coupling=semidiscrete",
    "flow coupling=semidiscrete velocity=mean steps=1",
    "drift",
    "coupling",
    "ar",
]
Row = dict[str, float]
Distance = Callable[[Tensor], Row]  # of the images of codes; empty without a generator


def of_nothing(rows: int, dim: int) -> tuple[Tensor, Constraint, Distance]:
    """Synthetic codes, where they lie, and no distance, as there is no generator."""
    return synthetic(rows, dim), "sphere", lambda z_BD: {}


def of_run(run: Path, extractor: str) -> tuple[Tensor, Constraint, Distance]:
    """The codes of a run, where they lie, and the Fréchet distance of the images of other codes."""
    config = read_config(run)
    shared = load_stage_one(run, config.evaluation.model_copy(update={"extractor": extractor}))
    model, metric = load_model(run, s3=config.s3), frechet_metric(extractor)
    panel, judge = build_panel([metric]), shared.judge
    real, named = (judge.real, "training") if judge.held_out is None else (judge.held_out, "held-out")

    def images(z_BD: Tensor) -> Iterator[Tensor]:
        for part_BD in z_BD.split(BATCH):
            yield channels_first(model.decode(part_BD))

    def distance(z_BD: Tensor) -> Row:
        [result] = panel.compare(real.whole, panel.tally(images(z_BD)), "drawn")
        return {f"{metric.title}, {named}": result.value}

    return shared.z_ND, config.constraint, distance


def figures(z_BD: Tensor, train: KeptFeatures, held_out: KeptFeatures, distance: Distance) -> Row:
    drawn = kept(z_BD)
    near = compare_manifolds(held_out, drawn)
    copying = copying_of_codes(train, drawn)
    return {"precision": near.precision, "recall": near.recall, "copying": copying, **distance(z_BD)}


def fitted(case: str, z_ND: Tensor, constraint: Constraint, seed: int) -> tuple[Tensor, Row]:
    """Draws of a case such as `flow coupling=minibatch`, and the CPU seconds of its fit and of its draws."""
    kind, *overrides = case.split()
    tree: dict[str, Any] = {"kind": kind} | {key: yaml.safe_load(value) for key, value in pairs(overrides)}
    torch.manual_seed(seed + 1)
    config = SAMPLERS[kind].model_validate(tree)
    sampler = build_sampler(config, z_ND.shape[1], constraint, seed=seed, device=torch.device("cpu"))
    began = time.process_time()
    for _ in sampler.fit(Codes(z_ND, range(len(z_ND)), len(z_ND)), 0, lambda: torch.zeros(0)):
        pass
    fit_s = time.process_time() - began
    e_BE = noise(seed, stream_of(kind), torch.arange(DRAWN), sampler.network.noise_dim, stream=Stream.SAMPLES)
    began = time.process_time()
    drawn_BD = torch.cat([sampler.codes(part) for part in e_BE.split(1000)])
    return drawn_BD, {"fit, s": fit_s, "1,000 draws, s": (time.process_time() - began) * 1000 / DRAWN}


def pairs(overrides: list[str]) -> Iterator[tuple[str, str]]:
    for override in overrides:
        key, value = override.split("=")
        yield key, value


def line(name: str, row: Row, columns: list[str], paper: Row) -> str:
    cells = [
        "-" if column not in row else f"{row[column]:.3g}" + beside(row[column], paper.get(column))
        for column in columns
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def beside(value: float, paper: float | None) -> str:
    return f" ({value / paper:.2f})" if paper else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--kinds", nargs="*", default=ALL, help="kinds with keys of sampler.*")
    parser.add_argument("--extractor", default="lite0-96")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2500, help="synthetic codes")
    parser.add_argument("--dim", type=int, default=16, help="of the synthetic codes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.run is None:
        codes_ND, constraint, distance = of_nothing(options.rows, options.dim)
    else:
        codes_ND, constraint, distance = of_run(options.run, options.extractor)
    order = torch.randperm(len(codes_ND), generator=torch.Generator().manual_seed(0))
    held_HD, z_ND = codes_ND[order[: len(order) // 5]], codes_ND[order[len(order) // 5 :]].contiguous()
    train, held_out = kept(z_ND), kept(held_HD)
    print(f"{len(z_ND)} codes of {z_ND.shape[1]}, {len(held_HD)} held out, {options.threads} threads")
    bounds = {
        "held-out codes": figures(held_HD, train, held_out, distance),
        "training codes": figures(z_ND[:DRAWN], train, held_out, distance),
    }
    columns = [*bounds["training codes"], "fit, s", "1,000 draws, s"]
    print("| sampler | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in bounds.items():
        print(line(name, row, columns, {}), flush=True)
    paper: Row = {}
    for case in dict.fromkeys([PAPER, *options.kinds]):
        rows = []
        for seed in range(options.seeds):
            drawn_BD, seconds = fitted(case, z_ND, constraint, seed)
            rows.append(figures(drawn_BD, train, held_out, distance) | seconds)
        mean = {column: statistics.mean(row[column] for row in rows) for column in columns}
        print(line(f"`{case}`", mean, columns, paper), flush=True)
        paper = paper or mean


if __name__ == "__main__":
    main()
