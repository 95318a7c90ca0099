"""Cost of measuring a run: at its end, and while it trains (`evaluation.every_epochs`)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from ...config.run import Config
from ...inference.model import DEFAULT_BATCH
from ...metrics.evaluate import RECONSTRUCTED, images_in_all, kinds_of
from ...metrics.features.extractor import extractor_spec
from ...models.cost import Cost, inference_bytes
from ...models.generators import generator_of
from ..stage import stage_infos

ASSUMED_PIXELS = 30e6  # decoded from PNG in a second by one thread
FLOAT = 4  # bytes
GIB = 1 << 30


@dataclass(frozen=True)
class EvaluationCost:
    """Work of the workers at the end of a run.

    images: drawn or read, over all workers. pixels: of those that are read. flops: of the generator and the extractor.
    at_once: images that are drawn at once on a worker. memory: bytes for them on its device.
    """

    images: int
    pixels: int
    flops: float
    at_once: int
    memory: int

    def hours(self, config: Config, workers: int, flops_per_second: float) -> float:
        """Duration on workers with so many FLOP/s each: images are read first, and compared then."""
        threads = config.data.threads if config.cluster.gpus_per_worker else worker_threads(config)
        reading = self.pixels / (ASSUMED_PIXELS * threads)
        return (reading + self.flops / flops_per_second) / workers / 3600


@dataclass(frozen=True)
class InterimCost:
    """Work of all measurements while the run trains, for which it pauses.

    The real images are not part of it: they are read at the first measurement in place of the end. images: that are
    drawn, over all workers. flops: of the generator and the extractor.
    """

    measurements: int
    images: int
    flops: float

    def hours(self, workers: int, flops_per_second: float) -> float:
        """Duration on workers with so many FLOP/s each."""
        return self.flops / flops_per_second / workers / 3600


def evaluation_cost(config: Config, rows: int, held_out: int, generator: Cost) -> EvaluationCost:
    """Cost of measuring the trained run, in float32 and forward only.

    Args:
        rows, held_out: numbers of training images and of unseen ones.
    """
    measured, kinds = config.evaluation, kinds_of(config)
    with torch.device("meta"):
        decoder = generator_of(config)
    needed = inference_bytes(decoder, (config.generator.latent_dim,))
    at_once = max(1, min(DEFAULT_BATCH, int(measured.memory_gb * GIB) // needed))
    reconstructed, compared = min(rows, measured.samples), min(rows, RECONSTRUCTED)
    if not config.has_codes:
        reconstructed = compared = 0
    drawn, images = kinds * measured.samples + reconstructed, images_in_all(config, rows, held_out, kinds)
    features = (drawn + rows + held_out) * extractor_spec(measured.extractor).gflop * 1e9
    return EvaluationCost(
        images,
        (images - drawn) * config.data.resolution**2,
        (drawn + compared) * generator.forward_flops + features,
        at_once,
        at_once * needed,
    )


def interim_cost(config: Config, rows: int, generator: Cost) -> InterimCost:
    """Cost of the measurements while the run trains: in stage 1 of samples and reconstructions, later of samples.

    An averaged generator with BatchNorm also passes all codes, once for each of its layers, for exact statistics.
    """
    every, samples = config.evaluation.every_epochs, config.evaluation.interim_samples
    if every is None:
        return InterimCost(0, 0, 0.0)
    first, *later = (math.ceil(info.epochs / every) for info in stage_infos(config).values())
    first = 0 if config.stage_one is not None else first
    images = first * (samples + (min(rows, samples) if config.has_codes else 0)) + sum(later) * samples
    passed = first * rows * len(config.generator.norms) if config.has_codes and config.glo.ema else 0
    features = images * extractor_spec(config.evaluation.extractor).gflop * 1e9
    return InterimCost(first + sum(later), images, (images + passed) * generator.forward_flops + features)


def worker_threads(config: Config) -> int:
    """Cores that a worker has on a machine like this one."""
    return max(1, min(int(config.cluster.cpus_per_worker), os.cpu_count() or 1))
