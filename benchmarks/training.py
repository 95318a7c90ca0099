"""A step of stage 1 and an epoch of stage 2 against the published single-process code, on the CPU, in one run.

    python benchmarks/training.py [--stage 1|2] [--rows N --batch B]

Stage 1: digits of 28 px, VGG-16 up to its third block, the whole step with its codes, by CPU time of one thread. Theirs
as shipped, where the weights of VGG get gradients too, and without these. Ours has one convolution more, up to relu3_3
of the paper, where that code takes conv3_2. Stage 2: candidates, search and updates of an epoch.

Legend: N rows, B batch.
"""

from __future__ import annotations

import argparse
import time
from typing import cast

import numpy as np
import torch
from glann.cluster.latents import LatentTable
from glann.config.run import load
from glann.datasets.loader import Batch, PlannedBatch
from glann.models.generators import generator_of
from glann.models.losses import PerceptualLoss, build_loss
from glann.models.perceptual import Vgg16, build_features
from glann.samplers.base import Codes, build_sampler
from glann.trainers.engine.build import build_engine
from glann.trainers.engine.optimizer import OptimizerConfig
from glann.trainers.feature_cache import FeatureCache
from glann.trainers.glo import launch, visit
from harness import Row, least, machine, report
from published import GloStep, ImleEpoch

DIM, NOISE = 64, 32


class OurStep:
    """A step of `paper-mnist` as a worker takes it, codes included, on images in memory.

    cached: with `loss.cache_features`, on one batch again and again, whose feature maps are known after one visit.
    """

    def __init__(self, img_NCHW: torch.Tensor, batch: int, cached: bool) -> None:
        changes = ["engine.kind=torch", f"glo.batch_size={batch}", f"loss.cache_features={1000 * cached}"]
        self.config = load("paper-mnist", changes)
        keys, device = self.config.glo, torch.device("cpu")
        self.pixels_NCHW = (255 * img_NCHW).to(torch.uint8)
        self.table = LatentTable.in_process(range(len(img_NCHW)), DIM, 0, optimizer=keys.latent_optimizer, batch=batch)
        optimizer = OptimizerConfig(keys.generator_lr, keys.betas, keys.ema)
        self.engine = build_engine(generator_of(self.config), optimizer, self.config.engine, batch, device, None)
        features = build_features("vgg16", Vgg16("torch").state_dict(), "torch")
        self.loss = cast(PerceptualLoss, build_loss(self.config.loss, 28, features))
        self.known = FeatureCache(self.config, range(batch), device, self.loss.real_maps) if cached else None
        self.step, self.batch, self.steps = 0, batch, len(img_NCHW) // batch

    def __call__(self) -> None:
        first = 0 if self.known else self.batch * self.step
        rows_B, ones_B = np.arange(first, first + self.batch), np.ones(self.batch, np.float32)
        planned = PlannedBatch(self.step, rows_B, ones_B)
        img_BCHW = self.pixels_NCHW[first : first + self.batch]
        batch = Batch(self.step, torch.from_numpy(rows_B), img_BCHW, torch.from_numpy(ones_B))
        at = (0, self.steps)
        given = (self.config, self.table, self.engine, self.loss, at, planned, None, batch, torch.zeros(3), self.known)
        step = launch(*given)
        visit(self.table, *at, float(self.config.glo.latent_lr), step, step.result())
        self.step += 1


def stage_one(rows: int = 50_000, batch: int = 128, repeats: int = 3, threads: int = 1) -> list[Row]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    img_NCHW = torch.rand(rows, 1, 28, 28)
    sides = {
        "ours": OurStep(img_NCHW, batch, cached=False),
        "cached": OurStep(img_NCHW, batch, cached=True),
        "as shipped": GloStep(img_NCHW, DIM, batch, 3, frozen=False),
        "frozen": GloStep(img_NCHW, DIM, batch, 3, frozen=True),
    }
    taken = least(sides, repeats, time.process_time)
    work = f"GLO step, 28 px, batch {batch}, {threads} thread, CPU time"
    return [
        Row(f"{work}{how}", f"published, {other}", taken[other], taken[name], "s", bar)
        for name, how in (("ours", ""), ("cached", ", loss.cache_features"))
        for other, bar in (("as shipped", 2.2), ("frozen", 1.25))
    ]


class OurEpoch:
    """An epoch of the mapping of `paper-mnist`, the whole of it."""

    def __init__(self, z_ND: torch.Tensor, batch: int) -> None:
        config = load("paper-mnist", ["sampler.epochs=1000", f"sampler.batch_size={batch}"])
        self.codes = Codes(z_ND, range(len(z_ND)), len(z_ND))
        sampler = build_sampler(config.sampler, DIM, "sphere", seed=0, device=torch.device("cpu"))
        self.steps = sampler.fit(self.codes, 0, lambda: torch.zeros(0))

    def __call__(self) -> None:
        for step in self.steps:
            if step.epoch_facts:
                return


def stage_two(rows: int = 50_000, batch: int = 128, repeats: int = 1, threads: int = 2) -> list[Row]:
    import faiss

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    torch.manual_seed(0)
    z_ND = torch.nn.functional.normalize(torch.randn(rows, DIM), dim=1)
    sides = {"ours": OurEpoch(z_ND, batch), "theirs": ImleEpoch(z_ND.numpy(), NOISE, batch)}
    cpu: dict[str, float] = {}
    wall: dict[str, float] = {}
    for _ in range(repeats):
        for name, epoch in sides.items():
            began, used = time.perf_counter(), time.process_time()
            epoch()
            wall[name] = min(wall.get(name, np.inf), time.perf_counter() - began)
            cpu[name] = min(cpu.get(name, np.inf), time.process_time() - used)
    work = f"IMLE epoch, N = {rows:,}, M = 2 N, d = {DIM}, {threads} threads"
    return [
        Row(f"{work}, wall", "published, faiss", wall["theirs"], wall["ours"], "s", 5.0),
        Row(f"{work}, CPU time", "published, faiss", cpu["theirs"], cpu["ours"], "s", 3.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), help="one of them only")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    sizes = {"rows": options.rows, "batch": options.batch}
    rows = []
    for stage, measure in ((1, stage_one), (2, stage_two)):
        if options.stage in (None, stage):
            rows += measure(**sizes)
    report(rows, machine())


if __name__ == "__main__":
    main()
