"""Evaluation of a run: how well it reconstructs its images, and how close its samples are to them.

Measures the metrics of `spec.py`; images are drawn, read and passed through an extractor once for all metrics. Several
workers share the work (`team.py`).

Shapes: B batch, C, H, W channels, height, width, N rows, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..cluster.checkpoints import reader, retention
from ..cluster.placement import ranges
from ..config.run import Config
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..inference.model import SamplingModel
from ..inference.package import ModelManifest
from ..storage.base import Store
from ..storage.open import open_store
from .copying import nearest_pairs
from .features.extractor import build_extractor
from .judge import Codes, batches_of, build_judge, channels_first, draw, tally_images
from .nearest import DEFAULT_LIMIT
from .panel import Panel, code_panel
from .reference import held_out_images, moved, open_images, require_same, training_images, training_set
from .result import BASELINE, HELD_OUT, OWN, Result
from .spec import CODES, Metric, Reconstructions, Samples, measured_with
from .tally import KeptFeatures, Mean
from .team import ALONE, Team, counting

RECONSTRUCTED = 2000  # rows used to measure reconstruction; more change the third digit
CODES_AT_ONCE = 100_000  # rows of the latent table in memory
GIB = 1 << 30


@dataclass(frozen=True)
class Trained:
    """A trained model, and the codes of its `rows` training images, if there are any."""

    model: SamplingModel
    rows: int
    codes: Codes | None = None


@dataclass(frozen=True)
class ImageSets:
    """The images that a model is compared with.

    images: the training images or, if `unseen`, others. training: the training images beside unseen ones. held_out:
    unseen images beside the training images.
    """

    images: ImageRows
    unseen: bool = False
    training: ImageRows | None = None
    held_out: ImageRows | None = None


def evaluate(
    config: Config,
    manifest: ModelManifest,
    model: SamplingModel,
    *,
    seed: int = 0,
    data: str | None = None,
    with_codes: bool = True,
    step: int | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Measure what `evaluation` configures, in this process and on the model's device.

    Args:
        config: configuration of the run; `evaluation` sets the extractor, the metrics and the number of samples.
        manifest, model: the packaged model of the run.
        data: address of the images to compare with: the training images, if they were moved, or others.
        with_codes: whether the checkpoints of the run are available; reconstruction needs its codes.
        step: the checkpoint that the model was made of; None is the newest.
        on_images: called with the images that were worked on, and their number in all.
    Returns:
        What `measure` returns. Copying is measured against other images than the training images if these can be read
        at their own address.
    Raises:
        UserError: the images are not those that the model was trained for, or the held-out ones are not there.
    """
    at_home, config = config, moved(config, data)
    images = open_images(config)
    require_same(images, manifest, config, data)
    unseen = images.index.fingerprint != manifest.fingerprint
    training = training_set(at_home, manifest) if unseen and with_codes else None
    sets = ImageSets(images, unseen, training, None if unseen else held_out_images(config, images.index))
    model = replace(model, memory=int(config.evaluation.memory_gb * GIB))
    coded = with_codes and config.has_codes
    trained = Trained(model, manifest.rows, (lambda rows: stored_codes(config, rows, step)) if coded else None)
    unseen_rows = 0 if sets.held_out is None else len(sets.held_out)
    total = images_in_all(config, len(images), unseen_rows, len(samplers_of(model)), pictures=False)
    return measure(config, trained, sets, seed=seed, team=Team(on_images=counting(on_images, total)))


def measure(
    config: Config,
    trained: Trained,
    sets: ImageSets,
    *,
    seed: int = 0,
    team: Team = ALONE,
) -> list[Result]:
    """Measure what `evaluation` configures, for the run's own sampler and the baseline. Collective.

    Returns:
        On rank 0 the results, elsewhere none: of reconstructions, if the codes are available, and their pixels only of
        the training images; of real images; then the metrics of samples, for the run's own sampler and for a Gaussian
        over the codes (`gaussian`, the sampling of GLO). With held-out images all but pixels are also measured against
        them, copying as well, and name them as the reference set.
    """
    model, codes, samples = trained.model, trained.codes, config.evaluation.samples
    metrics = measured_metrics(config)
    judge = build_judge(config, sets.images, metrics, samples, seed, model.device, sets.training, sets.held_out, team)
    if sets.unseen:
        judge = replace(judge, named=HELD_OUT)
    results = []
    if codes is not None and not sets.unseen:
        results += reconstruction(config, model, codes, sets.images, metrics, team)
    results += judge.measure_floor()
    if codes is not None:
        results += judge.measure_reconstructions(model, codes, trained.rows)
    for sampler in samplers_of(model):
        results += judge.measure(model, None if sampler == model.own else sampler)
    if codes is not None:
        results += measure_codes(code_panel(metrics), model, codes, trained.rows, samples, seed, team)
    return results


def measured_metrics(config: Config) -> list[Metric]:
    """The metrics of a run: those configured and, of a sampler that may draw training codes, those of codes."""
    more = [CODES] if config.sampler.copies else []
    return measured_with(config.evaluation.extractor, [*config.evaluation.metrics, *more])


def images_in_all(config: Config, rows: int, held_out: int, kinds: int, pictures: bool = True) -> int:
    """Images that the evaluation of a run draws or reads, with its pictures, if no tallies of real images are kept.

    Args:
        rows, held_out: numbers of images. kinds: samplers that are measured. pictures: whether the nearest training
            images are searched for a picture.
    """
    samples = config.evaluation.samples
    searched = min(rows, DEFAULT_LIMIT) if pictures else 0
    reconstructed = min(rows, RECONSTRUCTED) + min(rows, samples) if config.has_codes else 0
    return rows + held_out + reconstructed + kinds * samples + searched


def reconstruction(
    config: Config,
    model: SamplingModel,
    codes: Codes,
    images: ImageRows,
    metrics: Iterable[Metric],
    team: Team = ALONE,
) -> list[Result]:
    """Measure reconstructions G(z_i) of the first rows against x_i. Collective."""
    measures = {metric.name: metric.needs for metric in metrics if isinstance(metric.needs, Reconstructions)}
    extractors = {
        needs.extractor: build_extractor(needs.extractor, model.device)
        for needs in measures.values()
        if needs.extractor
    }
    rows = team.part(min(len(images), RECONSTRUCTED))
    z_ND = torch.cat(list(codes(rows))) if rows else torch.zeros(0, 1)
    means, at = dict.fromkeys(measures, Mean()), 0
    for real_BCHW in team.counted(training_images(images, rows, config)):
        index_B = rows.start + torch.arange(at, at + len(real_BCHW))
        fake_BCHW = channels_first(model.decode(z_ND[at : at + len(real_BCHW)]))
        for name, needs in measures.items():
            more = (extractors[needs.extractor],) if needs.extractor else ()
            means[name] = means[name].update(needs.per_image(fake_BCHW, real_BCHW, *more), index_B)
        at += len(real_BCHW)
    parts = team.collected(means)
    return [Result(name, reduce(Mean.merge, (part[name] for part in parts)).value()) for name in measures if parts]


def measure_codes(
    panel: Panel,
    model: SamplingModel,
    codes: Codes,
    rows: int,
    samples: int,
    seed: int = 0,
    team: Team = ALONE,
) -> list[Result]:
    """Measure the model's own sampler and the baseline in the space of codes; no image is decoded. Collective.

    Args:
        panel: from `code_panel`.
        rows: number of training codes.
        samples: codes to draw from each sampler.
    """
    if not panel.metrics:
        return []
    own, part, results = team.part(rows), team.part(samples), list[Result]()
    real = team.merged(panel.tally(codes(own), own.start))
    for sampler in samplers_of(model):
        drawn = team.merged(panel.tally(draw_codes(model, part, seed, sampler), part.start))
        if team.leads:
            results += panel.compare(real, drawn, OWN if sampler == model.own else sampler)
    return results


def closest_pairs(
    config: Config, model: SamplingModel, images: ImageRows, count: int, seed: int = 0
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
        {"kept": Samples(KeptFeatures, nearest_pairs, extractor)}, {extractor: build_extractor(extractor, model.device)}
    )
    train = tally_images(panel, images, config, count).whole.by_metric["kept"]
    drawn = panel.tally(draw(model, range(config.evaluation.samples), seed)).by_metric["kept"]
    index_N, row_N = nearest_pairs(cast(KeptFeatures, train), cast(KeptFeatures, drawn), count)
    z_ND = model.codes(model.noise(torch.from_numpy(index_N), seed))
    return model.decode(z_ND), np.stack([images.decode(row).transpose(1, 2, 0) for row in row_N.tolist()])


def samplers_of(model: SamplingModel) -> list[str]:
    """The kinds of samplers that are measured: the model's own, and the baseline where there are codes."""
    return [kind for kind in dict.fromkeys((model.own, BASELINE)) if kind == model.own or kind in model.samplers]


def kinds_of(config: Config) -> int:
    """The number of samplers of a run that are measured."""
    return len({config.sampler.kind, BASELINE}) if config.has_codes else 1


def draw_codes(model: SamplingModel, part: range, seed: int, sampler: str | None = None) -> Iterator[Tensor]:
    """The codes z_BD of consecutive images of a seed."""
    for index_B in batches_of(part):
        yield model.codes(model.noise(index_B, seed, sampler), sampler).cpu()


def stored_codes(config: Config, rows: range, step: int | None = None) -> Iterator[Tensor]:
    """The codes z_BD of consecutive rows in a checkpoint, by default the newest. Raises UserError without one."""
    store = open_store(config.checkpoint_url, config.s3)
    step = retention.latest(store) if step is None else step
    if step is None:
        raise UserError(f"no checkpoint in {store.url}: its latent codes are needed to measure reconstruction")
    return codes_in(store, rows, step)


def codes_in(store: Store, rows: range, step: int) -> Iterator[Tensor]:
    """The codes z_BD of consecutive rows in a checkpoint, block by block."""
    for part in ranges(len(rows), -(-len(rows) // CODES_AT_ONCE)) if rows else ():
        block = range(rows.start + part.start, rows.start + part.stop)
        yield torch.from_numpy(reader.load_rows(store, step, block, ("z",))["z"])
