"""Evaluation of a run: how well it reconstructs its images, and how close its samples are to them.

Measures the metrics of `spec.py`; images are drawn, read and passed through an extractor once for all metrics.

Shapes: B batch, C, H, W channels, height, width, N rows, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..cluster.checkpoints import reader, retention
from ..cluster.placement import ranges
from ..config.run import Config
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..inference.model import DEFAULT_BATCH, SamplingModel
from ..inference.package import ModelManifest
from ..storage.open import open_store
from . import cache
from .copying import nearest_pairs
from .features.extractor import build_extractor
from .panel import Panel, Tallied, build_panel, code_panel, held_out_metrics
from .parallel import on_one_core_each
from .reference import BATCH, held_out_images, moved, open_images, require_same, training_images, training_set
from .result import BASELINE, FLOOR, HELD_OUT, OWN, RECONSTRUCTION, Result
from .spec import Metric, Reconstructions, Samples, measured_with
from .tally import KeptFeatures, Mean

RECONSTRUCTED = 2000  # rows used to measure reconstruction; more change the third digit
CODES_AT_ONCE = 100_000  # rows of the latent table in memory


@dataclass(frozen=True)
class Parts:
    """Tallies of the images of a set in two disjoint parts: some, and all others."""

    some: Tallied
    others: Tallied

    @cached_property
    def whole(self) -> Tallied:
        return self.others.merge(self.some)


@dataclass(frozen=True)
class Judge:
    """Measures how far samples of models are from a fixed set of images.

    Every model draws `samples` images of `seed` and is compared with the same images.

    real: tallies of the images compared with, in two parts that `tally_images` makes. named: name of their set; None is
        the training images. training: tallies of the training images, if those are held out.
    held_out: the same of held-out images, if `real` are the training images: samples are compared with both.
    """

    panel: Panel
    real: Parts
    samples: int
    seed: int
    named: str | None = None
    training: Tallied | None = None
    held_out: Parts | None = None

    def measure(self, model: SamplingModel, sampler: str | None = None) -> list[Result]:
        """Draw once, by `sampler` or the model's own, and compute every metric of the panel."""
        return self.compare(self.tally(model, sampler), sampler or OWN)

    def tally(self, model: SamplingModel, sampler: str | None = None) -> Tallied:
        """The tallies of images that are drawn by `sampler` or the model's own."""
        return self.panel.tally(draw(model, self.samples, self.seed, sampler))

    def compare(self, drawn: Tallied, sampler: str) -> list[Result]:
        """The metrics of images that were tallied."""
        return self._compare(self.panel, drawn, sampler)

    def measure_reconstructions(self, model: SamplingModel, codes: Iterable[Tensor]) -> list[Result]:
        """The metrics that reconstructions bound, of as many reconstructions G(z) as `samples`, by random rows.

        Args:
            codes: all training codes z_BD, in row order.
        """
        panel = self.panel.bounded()
        if not panel.metrics:
            return []
        z_ND = torch.from_numpy(_kept(codes, self.samples).features_NF).float()
        images = (_channels_first(model.decode(z_BD)) for z_BD in z_ND.split(BATCH))
        return self._compare(panel, panel.tally(images), RECONSTRUCTION)

    def _compare(self, panel: Panel, drawn: Tallied, sampler: str) -> list[Result]:
        real = self.real.whole
        results = panel.compare(real, drawn, sampler, named=self.named, training=self.training)
        if self.held_out is None:
            return results
        return results + panel.compare(self.held_out.whole, drawn, sampler, named=HELD_OUT, training=real)

    def measure_floor(self) -> list[Result]:
        """The metrics that real images bound, of some of a set against the others of it: what no sampler gets below.

        The others are fewer than the images that samples are compared with, and a distance of small sets is larger: the
        floor is not too low.
        """
        panel, results = self.panel.bounded(), list[Result]()
        for real, named in ((self.real, self.named), (self.held_out, HELD_OUT)):
            if real is not None and min(real.some.count, real.others.count) >= 2:
                results += panel.compare(real.others, real.some, FLOOR, named=named)
        return results


def build_judge(
    config: Config,
    images: ImageRows,
    metrics: Iterable[Metric],
    samples: int,
    seed: int = 0,
    device: str = "cpu",
    training: ImageRows | None = None,
    held_out: ImageRows | None = None,
) -> Judge:
    """A judge for those of `metrics` that need samples, against `images`, which are read once.

    Args:
        samples: number of images to draw from a model.
        training: the training images, if `images` are held out.
        held_out: held-out images, if `images` are the training images.
    """
    panel = build_panel(metrics, device)
    judge = Judge(panel, tally_images(panel, images, config, samples), samples, seed)
    if held_out is not None:
        return replace(judge, held_out=tally_images(panel, held_out, config, samples))
    copies = panel.only(held_out_metrics(panel.metrics))
    if training is None or not copies.metrics:
        return judge
    return replace(judge, named=HELD_OUT, training=tally_images(copies, training, config, samples).whole)


def tally_images(panel: Panel, images: ImageRows, config: Config, samples: int) -> Parts:
    """The tallies of all images of a data set. Their features are computed once, and kept (`cache.py`).

    Args:
        samples: size of the first part, random images; at most half of the set.
    """
    order_N = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    part_N = torch.ones(len(images), dtype=torch.int64)
    part_N[order_N[: min(samples, len(images) // 2)]] = 0
    some, others = _split_images(panel, images, config, part_N)
    return Parts(some, others)


def _split_images(panel: Panel, images: ImageRows, config: Config, part_N: Tensor) -> list[Tallied]:
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
        return replay.split(torch.arange(rows).split(BATCH), part_N.__getitem__, 2)
    recorders = {name: cache.Recorder(extract) for name, extract in panel.extractors.items() if paths[name]}
    recording = replace(panel, extractors={**panel.extractors, **recorders})
    tallied = recording.split(training_images(images, rows, config), part_N.__getitem__, 2)
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
        images; of real images; then the metrics of samples, for the run's own sampler and for a Gaussian over the
        codes (`gaussian`, the sampling of GLO). With held-out images (`held_out_images`) all but pixels are also
        measured against them, copying as well, and name them as the reference set. With other images than the training
        images as `data` they are the reference set, and copying is measured if the training images can be read at their
        own address.
    Raises:
        UserError: the images are not those that the model was trained for, or the held-out ones are not there.
    """
    at_home, config = config, moved(config, data)
    images = open_images(config)
    require_same(images, manifest, config, data)
    trained_on_them = images.index.fingerprint == manifest.fingerprint
    metrics = measured_with(config.evaluation.extractor, config.evaluation.metrics)
    training = None if trained_on_them or not with_codes else training_set(at_home, manifest)
    held_out = held_out_images(config, images.index) if trained_on_them else None
    judge = build_judge(config, images, metrics, config.evaluation.samples, seed, device, training, held_out)
    if not trained_on_them:
        judge = replace(judge, named=HELD_OUT)
    results = []
    if with_codes and trained_on_them:
        results += reconstruction(config, model, images, metrics, device)
    results += judge.measure_floor()
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
    train = tally_images(panel, images, config, count).whole.by_metric["kept"]
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
