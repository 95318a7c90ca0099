"""Evaluation of a run: how well it reconstructs its images, and how close its samples are to them.

Measures the metrics of `spec.py`; images are drawn, read and passed through an extractor once for all metrics.

Shapes: B batch, C, H, W channels, height, width, N rows, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..cluster.checkpoints import reader, retention
from ..cluster.placement import ranges
from ..config.run import Config
from ..datasets.fit import held_out_of, require_fit
from ..datasets.index import Index
from ..datasets.loader import BadRows, PlannedBatch, batches
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..inference.model import DEFAULT_BATCH, SamplingModel
from ..inference.package import ModelManifest
from ..storage.open import open_store
from . import cache
from .copying import CELLS, IN_A_CELL, nearest_pairs
from .features.extractor import build_extractor
from .panel import Panel, Tallied, build_panel, code_panel, held_out_metrics
from .parallel import on_one_core_each
from .result import BASELINE, HELD_OUT, OWN, RECONSTRUCTION, Result
from .spec import ALL, METRICS, Metric, Reconstructions, Samples, measured_with
from .tally import KeptFeatures, Mean

BATCH = 100
RECONSTRUCTED = 2000  # rows used to measure reconstruction; more change the third digit
CODES_AT_ONCE = 100_000  # rows of the latent table in memory


@dataclass(frozen=True)
class Judge:
    """Measures how far samples of models are from a fixed set of images.

    Every model draws `samples` images of `seed` and is compared with the same images.

    real: tallies of the images compared with. named: name of their set; None is the training images.
    training: tallies of the training images, if those are held out.
    held_out: tallies of held-out images, if `real` are the training images: samples are compared with both.
    """

    panel: Panel
    real: Tallied
    samples: int
    seed: int
    named: str | None = None
    training: Tallied | None = None
    held_out: Tallied | None = None

    def measure(self, model: SamplingModel, sampler: str | None = None) -> list[Result]:
        """Draw once, by `sampler` or the model's own, and compute every metric of the panel."""
        return self._compare(self.panel, draw(model, self.samples, self.seed, sampler), sampler or OWN)

    def measure_reconstructions(self, model: SamplingModel, codes: Iterable[Tensor]) -> list[Result]:
        """The metrics that reconstructions bound, of as many reconstructions G(z) as `samples`, by random rows.

        Args:
            codes: all training codes z_BD, in row order.
        """
        panel = self.panel.only(name for name in self.panel.metrics if METRICS[name].bounded)
        if not panel.metrics:
            return []
        z_ND = torch.from_numpy(_kept(codes, self.samples).features_NF).float()
        images = (_channels_first(model.decode(z_BD)) for z_BD in z_ND.split(BATCH))
        return self._compare(panel, images, RECONSTRUCTION)

    def _compare(self, panel: Panel, images: Iterable[Tensor], sampler: str) -> list[Result]:
        drawn = panel.tally(images)
        results = panel.compare(self.real, drawn, sampler, named=self.named, training=self.training)
        if self.held_out is None:
            return results
        return results + panel.compare(self.held_out, drawn, sampler, named=HELD_OUT, training=self.real)


def build_judge(
    config: Config,
    images: ImageRows,
    metrics: Iterable[Metric],
    samples: int,
    seed: int = 0,
    device: str = "cpu",
    training: ImageRows | None = None,
) -> Judge:
    """A judge for those of `metrics` that need samples, against `images`, which are read once.

    Args:
        samples: number of images to draw from a model.
        training: the training images, if `images` are held out.
    """
    panel = build_panel(metrics, device)
    judge = Judge(panel, tally_images(panel, images, config), samples, seed)
    copies = panel.only(held_out_metrics(panel.metrics))
    if training is None or not copies.metrics:
        return judge
    return replace(judge, named=HELD_OUT, training=tally_images(copies, training, config))


def tally_images(panel: Panel, images: ImageRows, config: Config) -> Tallied:
    """The tallies of all images of a data set. Their features are computed once, and kept (`cache.py`)."""
    rows, paths = len(images), {}
    for name, extract in panel.extractors.items():
        paths[name] = cache.path_of(images.index.fingerprint, rows, extract)
    kept = {
        name: features_NF
        for name, path in paths.items()
        if path is not None and (features_NF := cache.load(path, rows, panel.extractors[name].dim)) is not None
    }
    if kept and kept.keys() == panel.extractors.keys() and all(need.extractor for need in panel.metrics.values()):
        replay = replace(panel, extractors={name: features_NF.__getitem__ for name, features_NF in kept.items()})
        return replay.tally(torch.arange(rows).split(BATCH))
    recorders = {name: cache.Recorder(extract) for name, extract in panel.extractors.items() if paths[name]}
    tallied = replace(panel, extractors={**panel.extractors, **recorders}).tally(training_images(images, rows, config))
    for name, recorder in recorders.items():
        cache.save(cast(Path, paths[name]), torch.cat(recorder.seen))
    return tallied


def draw(model: SamplingModel, count: int, seed: int, sampler: str | None = None) -> Iterator[Tensor]:
    """The first images of a seed, uint8 [B, C, H, W]."""

    def images(index_B: Tensor) -> Tensor:
        return _channels_first(model.decode(model.codes(model.noise(index_B, seed, sampler), sampler)))

    parts = torch.arange(count).split(DEFAULT_BATCH)
    yield from on_one_core_each(images, parts) if model.device.type == "cpu" else map(images, parts)


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
    """Measure what `evaluation` configures, for the run's own sampler and the baseline.

    Args:
        config: configuration of the run; `evaluation` sets the extractor, the metrics and the number of samples.
        manifest, model: the packaged model of the run.
        data: address of the images to compare with: the training images, if they were moved, or others.
        with_codes: whether the checkpoints of the run are available; reconstruction needs its codes.
    Returns:
        Results: of reconstructions, if the codes are available, and their pixels only if `data` holds the training
        images; then the metrics of samples, for the run's own sampler and for a Gaussian over the codes (`gaussian`,
        the sampling of GLO). With held-out images (`held_out_images`) all these are also measured against them, copying
        as well, and name them as the reference set. With other images than the training images as `data` they are the
        reference set, and copying is measured if the training images can be read at their own address.
    Raises:
        UserError: the images are not those that the model was trained for, or the held-out ones are not there.
    """
    at_home, config = config, moved(config, data)
    images = open_images(config)
    require_same(images, manifest, config, data)
    trained_on_them = images.index.fingerprint == manifest.fingerprint
    metrics = measured_with(config.evaluation.extractor, config.evaluation.metrics)
    training = None if trained_on_them or not with_codes else training_set(at_home, manifest)
    judge = build_judge(config, images, metrics, config.evaluation.samples, seed, device, training)
    if not trained_on_them:
        judge = replace(judge, named=HELD_OUT)
    elif held_out := held_out_images(config, images.index):
        judge = replace(judge, held_out=tally_images(judge.panel, held_out, config))
    results = []
    if with_codes and trained_on_them:
        results += reconstruction(config, model, images, metrics, device)
    if with_codes:
        results += judge.measure_reconstructions(model, stored_codes(config, manifest.rows))
    for sampler in samplers_of(model):
        results += judge.measure(model, None if sampler == model.own else sampler)
    if with_codes:
        judged = code_panel(metrics)
        results += measure_codes(judged, model, stored_codes(config, manifest.rows), config.evaluation.samples, seed)
    return results


def reconstruction(
    config: Config, model: SamplingModel, images: ImageRows, metrics: Iterable[Metric], device: str = "cpu"
) -> list[Result]:
    """Measure reconstructions G(z_i) of the first rows against x_i. Raises UserError without a checkpoint."""
    measures = {metric.name: metric.needs for metric in metrics if isinstance(metric.needs, Reconstructions)}
    extractors = {
        needs.extractor: build_extractor(needs.extractor, device) for needs in measures.values() if needs.extractor
    }
    rows = range(min(len(images), RECONSTRUCTED))
    z_ND = torch.cat(list(stored_codes(config, len(rows))))
    means, at = dict.fromkeys(measures, Mean()), 0
    for real_BCHW in training_images(images, len(rows), config):
        index_B = torch.arange(at, at + len(real_BCHW))
        fake_BCHW = _channels_first(model.decode(z_ND[at : at + len(real_BCHW)]))
        for name, needs in measures.items():
            more = (extractors[needs.extractor],) if needs.extractor else ()
            means[name] = means[name].update(needs.per_image(fake_BCHW, real_BCHW, *more), index_B)
        at += len(real_BCHW)
    return [Result(name, mean.value()) for name, mean in means.items()]


def measure_codes(
    panel: Panel, model: SamplingModel, codes: Iterable[Tensor], samples: int, seed: int = 0
) -> list[Result]:
    """Measure the model's own sampler and the baseline in the space of codes; no image is decoded.

    Args:
        panel: from `code_panel`.
        codes: all training codes z_BD, in row order.
        samples: codes to draw from each sampler.
    """
    if not panel.metrics:
        return []
    real, results = panel.tally(codes), []
    for sampler in samplers_of(model):
        drawn = panel.tally(draw_codes(model, samples, seed, sampler))
        results += panel.compare(real, drawn, OWN if sampler == model.own else sampler)
    return results


def closest_pairs(
    config: Config, model: SamplingModel, images: ImageRows, count: int, seed: int = 0, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The samples that are nearest to a training image by `evaluation.extractor`, and those images, nearest first.

    Args:
        images: the training images, of which at most `KEPT` are searched.
        count: pairs.
    Returns:
        uint8 [N, H, W, C], twice.
    """
    extractor = config.evaluation.extractor
    panel = Panel(
        {"kept": Samples(KeptFeatures, nearest_pairs, extractor)}, {extractor: build_extractor(extractor, device)}
    )
    train = tally_images(panel, images, config).by_metric["kept"]
    drawn = panel.tally(draw(model, config.evaluation.samples, seed)).by_metric["kept"]
    index_N, row_N = nearest_pairs(cast(KeptFeatures, train), cast(KeptFeatures, drawn), count)
    z_ND = model.codes(model.noise(torch.from_numpy(index_N), seed))
    return model.decode(z_ND), np.stack([images.decode(row).transpose(1, 2, 0) for row in row_N.tolist()])


def samplers_of(model: SamplingModel) -> list[str]:
    """The kinds of samplers that are measured: the model's own, and the baseline."""
    return list(dict.fromkeys((model.own, BASELINE)))


def draw_codes(model: SamplingModel, count: int, seed: int, sampler: str | None = None) -> Iterator[Tensor]:
    """The codes z_BD of the first images of a seed."""
    for index_B in torch.arange(count).split(BATCH):
        yield model.codes(model.noise(index_B, seed, sampler), sampler).cpu()


def stored_codes(config: Config, rows: int) -> Iterator[Tensor]:
    """The codes z_BD of the first `rows` rows in the newest checkpoint. Raises UserError without a checkpoint."""
    store = open_store(config.checkpoint_url, config.s3)
    step = retention.latest(store)
    if step is None:
        raise UserError(f"no checkpoint in {store.url}: its latent codes are needed to measure reconstruction")
    for part in ranges(rows, -(-rows // CODES_AT_ONCE)):
        yield torch.from_numpy(reader.load_rows(store, step, part)["z"])


def _kept(codes: Iterable[Tensor], count: int) -> KeptFeatures:
    """A uniform sample of codes that depends on their rows only."""
    kept, at = KeptFeatures(count), 0
    for z_BD in codes:
        kept = kept.update(z_BD, torch.arange(at, at + len(z_BD)))
        at += len(z_BD)
    return kept


def _channels_first(img_BHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(img_BHWC).permute(0, 3, 1, 2)


def training_images(images: ImageRows, count: int, config: Config) -> Iterator[Tensor]:
    """The first `count` images in row order, uint8 [B, C, H, W]."""
    parts: Sequence[range] = ranges(count, -(-count // BATCH))
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


def held_out_images(config: Config, index: Index) -> ImageRows | None:
    """Open the images that training does not see (`fit.held_out_of`); None if there are none.

    Args:
        index: of the training images.
    Raises:
        UserError: they are not there, do not fit the training images, or are too few for the configured metrics.
    """
    found = held_out_of(config, index)
    if found is None:
        return None
    (url, held_out), groups = found, config.evaluation.metrics
    if ("copying" in groups or ALL in groups) and held_out.rows < CELLS * IN_A_CELL:
        raise UserError(
            f"evaluation.metrics={','.join(groups)} has a test of copying, which needs {CELLS * IN_A_CELL} held-out "
            f"images, and {url} holds {held_out.rows}; hold out more, or leave the test out"
        )
    data = config.data
    return ImageRows(url, config.s3, cache_dir=data.cache_dir, cache_gb=data.cache_gb)


def training_set(config: Config, manifest: ModelManifest) -> ImageRows | None:
    """The training images at the address of the configuration; None if they are not there any more."""
    try:
        images = open_images(moved(config, None))
    except UserError:
        return None
    return images if images.index.fingerprint == manifest.fingerprint else None


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
