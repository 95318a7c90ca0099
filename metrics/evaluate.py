"""How good a run is: how well it reconstructs its images, and how close its samples are to them.

What is measured is the table of `spec.py`; images are drawn, read and seen by an extractor once for all metrics.

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
RECONSTRUCTED = 2000  # rows whose reconstruction is measured; more changes the third digit
BASELINE = "gaussian"  # is measured beside the sampler of the run


@dataclass(frozen=True)
class Tallied:
    """What the metrics of samples keep of a set of images, by name of the metric; `count` images."""

    count: int
    by_metric: dict[str, Tally]


@dataclass(frozen=True)
class Panel:
    """Metrics of samples by name, measured together: images are seen once, and each extractor sees them once."""

    metrics: dict[str, Samples]
    extractors: dict[str, Extractor]

    def tally(self, images: Iterable[Tensor]) -> Tallied:
        """What the metrics keep of uint8 images [B, C, H, W], one batch at a time."""
        count, tallies = 0, {name: metric.tally() for name, metric in self.metrics.items()}
        for img_BCHW in images:
            features = {name: extract(img_BCHW) for name, extract in self.extractors.items()}
            for name, metric in self.metrics.items():
                seen = img_BCHW if metric.extractor is None else features[metric.extractor]
                tallies[name] = tallies[name].update(seen)
            count += len(img_BCHW)
        return Tallied(count, tallies)

    def compare(self, real: Tallied, drawn: Tallied, sampler: str) -> list[Result]:
        """The value of every metric, for samples of that sampler."""
        return [
            Result(name, metric.compare(real.by_metric[name], drawn.by_metric[name]), sampler)
            for name, metric in self.metrics.items()
        ]


def build_panel(metrics: Iterable[Metric], device: str = "cpu") -> Panel:
    """Those of the metrics that are of samples, with the extractors that they need.

    Raises:
        UserError: the weights of an extractor cannot be had.
    """
    chosen = {metric.name: metric.needs for metric in metrics if isinstance(metric.needs, Samples)}
    names = dict.fromkeys(metric.extractor for metric in chosen.values() if metric.extractor)
    return Panel(chosen, {name: build_extractor(name, device) for name in names})


@dataclass(frozen=True)
class Judge:
    """How far a model's samples are from the images that it is to resemble.

    Every model it judges draws `samples` images of `seed`, and is compared with the same images.
    """

    panel: Panel
    real: Tallied
    samples: int
    seed: int

    def measure(self, model: SamplingModel, sampler: str | None = None) -> list[Result]:
        """Draw once, by a sampler or the model's own, and measure by every metric of the panel."""
        drawn = self.panel.tally(draw(model, self.samples, self.seed, sampler))
        return self.panel.compare(self.real, drawn, sampler or model.own)


def build_judge(
    config: Config, images: ImageRows, metrics: Iterable[Metric], samples: int, seed: int = 0, device: str = "cpu"
) -> Judge:
    """A judge by `metrics`, as far as they are of samples, against `images`, which are read once.

    Args:
        samples: images drawn of a model.
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
    """Every metric of the table but those of other extractors, of samples by each sampler.

    Args:
        config: of the run; `evaluation` says which extractor and how many samples.
        manifest, model: what the run packaged, opened.
        data: where the images are, if not where they were for the training, or other images.
        with_codes: whether the checkpoints of the run are at hand; reconstruction needs its codes.
    Returns:
        Results: what needs codes only where these are, and only of the images they are the codes of; then what
        needs samples, by the run's own sampler and by a Gaussian over the codes (`gaussian`, GLO's sampling).
    Raises:
        UserError: the images are not those of the training.
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
    """The metrics that need codes, between G(z_i) and x_i over the first rows."""
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
    """The data set of a run."""
    data = config.data
    return ImageRows(data.url, config.s3, cache_dir=data.cache_dir, cache_gb=data.cache_gb, max_rows=data.max_rows)


def moved(config: Config, url: str | None) -> Config:
    """The configuration with its data at another address, if one is given.

    Raises:
        UserError: none is given and the known one has lost its password.
    """
    if url is None and "***@" in config.data.url:
        raise UserError(f"the password of {config.data.url} was not kept; say where the images are with --data URL")
    return config if url is None else config.model_copy(update={"data": config.data.model_copy(update={"url": url})})


def require_same(images: ImageRows, manifest: ModelManifest, config: Config, given: str | None) -> None:
    """Refuse images that have another form than the model's and, unless they were asked for by address, other images.

    Raises:
        UserError: they do not fit.
    """
    require_fit(images.index, config.data, 1)
    if given is None and images.index.fingerprint != manifest.fingerprint:
        raise UserError(
            f"{config.data.url} holds other images than {manifest.name} was trained on; give them with --data URL"
        )
