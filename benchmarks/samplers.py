"""Samplers compared on the codes of one run: in code space, and by the images that its generator makes of them.

    python benchmarks/samplers.py RUN [--kinds "gmm" "flow coupling=minibatch" ...] [--extractor lite0] [--seeds 3]

RUN is a finished run. A fifth of its codes is held out; every sampler is fitted to the others, in this process, and
draws as many codes as were held out. Columns: precision and recall in code space (k-th neighbour, k = 3, Kynkäänniemi
et al. 2019) against held-out codes; the median distance to the nearest code of the fit, over that of held-out codes
(below 1 means nearer than new codes are, 0 is a copy); the Fréchet distance of 2,000 images against all images of the
run; the CPU seconds of the fit. The rows `held-out codes` and `training codes` are what a perfect sampler, and one that
copies, would get.

Legend: N codes, H held-out codes, B draws, D latent dimension.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from glann.cluster.neighbours import nearest
from glann.config.samplers import SAMPLERS
from glann.inference.model import SamplingModel
from glann.inference.package import load_model
from glann.metrics.panel import build_panel
from glann.metrics.reference import BATCH
from glann.metrics.spec import frechet_metric
from glann.models.noise import Stream, noise, stream_of
from glann.reports.run_folder import read_config
from glann.samplers.base import Codes, build_sampler
from glann.trainers.run.local import StageOne, load_stage_one
from torch import Tensor

NEIGHBOURS = 3
DRAWN = 2000
ALL = [
    "gaussian",
    "gmm",
    "imle",
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


def radius(x_ND: Tensor) -> Tensor:
    """Distance to the k-th neighbour of each point, itself left out."""
    return torch.cdist(x_ND, x_ND).kthvalue(NEIGHBOURS + 1, dim=1).values


def inside(x_ND: Tensor, around_MD: Tensor) -> float:
    """Share of the points within the k-th neighbour distance of a point of the other set."""
    return float((torch.cdist(x_ND, around_MD) <= radius(around_MD)).any(1).float().mean())


def fitted(case: str, z_ND: Tensor, constraint: Any, seed: int) -> tuple[Callable[[int], Tensor], float]:
    """A function that draws codes of a case such as `flow coupling=minibatch`, and the CPU seconds of its fit."""
    kind, *overrides = case.split()
    tree: dict[str, Any] = {"kind": kind}
    for override in overrides:
        key, value = override.split("=")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = yaml.safe_load(value)
    torch.manual_seed(seed + 1)
    config = SAMPLERS[kind].model_validate(tree)
    sampler = build_sampler(config, z_ND.shape[1], constraint, seed=seed, device=torch.device("cpu"))
    began = time.process_time()
    for _ in sampler.fit(Codes(z_ND, range(len(z_ND)), len(z_ND)), 0, lambda: torch.zeros(0)):
        pass
    seconds = time.process_time() - began

    def draw(count: int) -> Tensor:
        e_BE = noise(seed, stream_of(kind), torch.arange(count), sampler.network.noise_dim, stream=Stream.SAMPLES)
        return torch.cat([sampler.codes(part) for part in e_BE.split(1000)])

    return draw, seconds


def images_of(model: SamplingModel, z_BD: Tensor) -> Any:
    """uint8 images [B, C, H, W] of codes, batch by batch."""
    for part_BD in z_BD.split(BATCH):
        yield torch.from_numpy(model.decode(part_BD)).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--kinds", nargs="*", default=ALL, help="kinds with keys of sampler.*")
    parser.add_argument("--extractor", default="lite0")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    config = read_config(options.run)
    evaluation = config.evaluation.model_copy(update={"extractor": options.extractor})
    shared: StageOne = load_stage_one(options.run, evaluation)
    model = load_model(options.run, s3=config.s3)
    metric = frechet_metric(options.extractor)
    panel = build_panel([metric])
    order = torch.randperm(len(shared.z_ND), generator=torch.Generator().manual_seed(0))
    held_HD, z_ND = shared.z_ND[order[: len(order) // 5]], shared.z_ND[order[len(order) // 5 :]].contiguous()
    usual = float(nearest(held_HD, z_ND)[1].sqrt().median())

    def row(codes_BD: Tensor, drawn_BD: Tensor) -> list[float]:
        copied = float(nearest(codes_BD, z_ND)[1].sqrt().median()) / usual
        judged = panel.compare(shared.judge.real.whole, panel.tally(images_of(model, drawn_BD)), "drawn")
        distance = next(result.value for result in judged if result.metric == metric.name)
        return [inside(codes_BD, held_HD), inside(held_HD, codes_BD), copied, distance]

    print(f"| sampler | precision | recall | nearest training code | {metric.title} | CPU s of the fit |")
    print("|---|---|---|---|---|---|")
    references = {"held-out codes": held_HD, "training codes": z_ND[: len(held_HD)]}
    for name, codes_BD in references.items():
        drawn_BD = held_HD if name == "held-out codes" else z_ND[:DRAWN]
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row(codes_BD, drawn_BD)) + " | - |", flush=True)
    for case in options.kinds:
        rows = []
        for seed in range(options.seeds):
            draw, seconds = fitted(case, z_ND, config.glo.constraint, seed)
            drawn_BD = draw(DRAWN)
            rows.append([*row(drawn_BD[: len(held_HD)], drawn_BD), seconds])
        means = " | ".join(f"{statistics.mean(values):.3g}" for values in zip(*rows, strict=True))
        print(f"| `{case}` | {means} |", flush=True)


if __name__ == "__main__":
    main()
