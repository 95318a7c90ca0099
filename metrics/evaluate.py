"""Evaluation of a run: how well it reconstructs its images, and how close its samples are to them.

Measures the metrics of `spec.py`; images are drawn, read and passed through an extractor once for all metrics.

Shapes: B batch, C, H, W channels, height, width, N rows, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cluster.checkpoints import reader, retention
from ..cluster.placement import ranges
from ..config.run import Config
from ..datasets.fit import require_fit
from ..datasets.loader import BadRows, PlannedBatch, batches
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..inference.model import SamplingModel
from ..inference.package import ModelManifest
from ..storage.open import open_store
from .features.extractor import Extractor, build_extractor
from .result import Result
from .spec import METRICS, Metric, Reconstructions, Samples, measured_with
from .tally import Mean, Tally

BATCH = 100
RECONSTRUCTED = 2000  # rows used to measure reconstruction; more change the third digit
BASELINE = "gaussian"  # measured beside the run's own sampler


@dataclass(frozen=True)
class Tallied:
    """The tallies of a set of `count` images, by name of the metric."""

    count: int
    by_metric: dict[str, Tally]


@dataclass(frozen=True)
class Panel:
    """Metrics of samples by name, measured together: one pass over the images, and one through each extractor."""

    metrics: dict[str, Samples]
    extractors: dict[str, Extractor]

    def tally(self, images: Iterable[Tensor]) -> Tallied:
        """Tally uint8 images [B, C, H, W], batch by batch."""
        count, tallies = 0, {name: metric.tally() for name, metric in self.metrics.items()}
        for img_BCHW in images:
            features = {name: extract(img_BCHW) for name, extract in self.extractors.items()}
            for name, metric in self.metrics.items():
                seen = img_BCHW if metric.extractor is None else features[metric.extractor]
                tallies[name] = tallies[name].update(seen)
            count += len(img_BCHW)
        return Tallied(count, tallies)

    def compare(self, real: Tallied, drawn: Tallied, sampler: str) -> list[Result]:
        """The value of every metric, for samples `drawn` by `sampler`."""
        return [
            Result(name, metric.compare(real.by_metric[name], drawn.by_metric[name]), sampler)
            for name, metric in self.metrics.items()
        ]


def build_panel(metrics: Iterable[Metric], device: str = "cpu") -> Panel:
    """A panel of those of `metrics` that need samples, with their extractors.

    Raises:
        UserError: the weights of an extractor are invalid. EnvironmentFault: they cannot be fetched.
    """
    chosen = {metric.name: metric.needs for metric in metrics if isinstance(metric.needs, Samples)}
    names = dict.fromkeys(metric.extractor for metric in chosen.values() if metric.extractor)
    return Panel(chosen, {name: build_extractor(name, device) for name in names})


@dataclass(frozen=True)
class Judge:
    """Measures how far samples of models are from a fixed set of images.

    Every model draws `samples` images of `seed` and is compared with the same real images.
    """

    panel: Panel
    real: Tallied
    samples: int
    seed: int

    def measure(self, model: SamplingModel, sampler: str | None = None) -> list[Result]:
        """Draw once, by `sampler` or the model's own, and compute every metric of the panel."""
        drawn = self.panel.tally(draw(model, self.samples, self.seed, sampler))
        return self.panel.compare(self.real, drawn, sampler or model.own)


def build_judge(
    config: Config, images: ImageRows, metrics: Iterable[Metric], samples: int, seed: int = 0, device: str = "cpu"
) -> Judge:
    """A judge for those of `metrics` that need samples, against `images`, which are read once.

    Args:
        samples: number of images to draw from a model.
    """
    panel = build_panel(metrics, device)
    return Judge(panel, panel.tally(training_images(images, len(images), config)), samples, seed)


def draw(model: SamplingModel, count: int, seed: int, sampler: str | None = None) -> Iterator[Tensor]:
    """The first images of a seed, uint8 [B, C, H, W]."""
    for part_NHWC in model.stream(count, seed, sampler=sampler):
        yield torch.from_numpy(part_NHWC).permute(0, 3, 1, 2)


def evaluate(
    config: Config,
    manifest: ModelManifest,
    model: SamplingModel,
    *,
    seed: int = 0,
    device: str = "cpu",
    data: str | None = None,
    with_codes: bool = True,
) -> list[Result]:
    """Measure every metric except those of other extractors, for the run's own sampler and the baseline.

    Args:
        config: configuration of the run; `evaluation` sets the extractor and the number of samples.
        manifest, model: the packaged model of the run.
        data: address of the images, if they were moved or are others than the training images.
        with_codes: whether the checkpoints of the run are available; reconstruction needs its codes.
    Returns:
        Results: reconstruction, if the codes are available and `data` holds the training images; then the metrics
        of samples, for the run's own sampler and for a Gaussian over the codes (`gaussian`, the sampling of GLO).
    Raises:
        UserError: the images are not the training images.
    """
    config = moved(config, data)
    images = open_images(config)
    require_same(images, manifest, config, data)
    results = []
    if with_codes and images.index.fingerprint == manifest.fingerprint:
        results = reconstruction(config, model, images)
    metrics = measured_with(config.evaluation.extractor)
    judge = build_judge(config, images, metrics, config.evaluation.samples, seed, device)
    samplers = dict.fromkeys((model.own, BASELINE))
    return results + [result for sampler in samplers for result in judge.measure(model, sampler)]


def reconstruction(config: Config, model: SamplingModel, images: ImageRows) -> list[Result]:
    """Measure reconstructions G(z_i) of the first rows against x_i. Raises UserError without a checkpoint."""
    store = open_store(config.checkpoint_url, config.s3)
    step = retention.latest(store)
    if step is None:
        raise UserError(f"no checkpoint in {store.url}: its latent codes are needed to measure reconstruction")
    rows = range(min(len(images), RECONSTRUCTED))
    z_ND = torch.from_numpy(reader.load_rows(store, step, rows)["z"])
    measures = {metric.name: metric.needs for metric in METRICS.values() if isinstance(metric.needs, Reconstructions)}
    means, at = dict.fromkeys(measures, Mean()), 0
    for real_BCHW in training_images(images, len(rows), config):
        fake_BCHW = torch.from_numpy(model.decode(z_ND[at : at + len(real_BCHW)])).permute(0, 3, 1, 2)
        means = {name: mean.update(measures[name].per_image(fake_BCHW, real_BCHW)) for name, mean in means.items()}
        at += len(real_BCHW)
    return [Result(name, mean.value()) for name, mean in means.items()]


def training_images(images: ImageRows, count: int, config: Config) -> Iterator[Tensor]:
    """The first `count` images in row order, uint8 [B, C, H, W]."""
    import numpy as np

    parts = ranges(count, -(-count // BATCH))
    plan = [
        PlannedBatch(step, np.arange(part.start, part.stop), np.ones(len(part), np.float32))
        for step, part in enumerate(parts)
    ]
    bad = BadRows(config.data.max_bad_fraction, len(images))
    for batch in batches(images, plan, threads=config.data.threads, prefetch=config.data.prefetch, max_bad=bad):
        yield batch.img_BCHW


def open_images(config: Config) -> ImageRows:
    """Open the data set of a run."""
    data = config.data
    return ImageRows(data.url, config.s3, cache_dir=data.cache_dir, cache_gb=data.cache_gb, max_rows=data.max_rows)


def moved(config: Config, url: str | None) -> Config:
    """Replace the address of the data, if another is given.

    Raises:
        UserError: none is given, and the password of the configured address was removed.
    """
    if url is None and "***@" in config.data.url:
        raise UserError(
            f"the password of {config.data.url} was not kept; give the address of the images with --data URL"
        )
    return config if url is None else config.model_copy(update={"data": config.data.model_copy(update={"url": url})})


def require_same(images: ImageRows, manifest: ModelManifest, config: Config, given: str | None) -> None:
    """Check that images have the model's resolution and channels and, without a given address, its fingerprint.

    Raises:
        UserError: they do not.
    """
    require_fit(images.index, config.data, 1)
    if given is None and images.index.fingerprint != manifest.fingerprint:
        raise UserError(
            f"{config.data.url} holds other images than {manifest.name} was trained on; give them with --data URL"
        )
