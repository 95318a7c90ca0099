"""How good a run is: how well it reconstructs its images, and how close its samples are to them.

Shapes: B batch, C, H, W channels, height, width, N rows, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cluster.checkpoints import reader, retention
from ..cluster.placement import ranges
from ..config.run import Config
from ..datasets.assets.catalogue import load_weights
from ..datasets.fit import require_fit
from ..datasets.loader import BadRows, PlannedBatch, batches
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..inference.model import SamplingModel
from ..inference.package import Manifest
from ..storage.open import open_store
from .features.extractor import Extractor, build_extractor
from .frechet import Moments, frechet_distance, moments_of
from .reconstruction import ReconstructionError

BATCH = 100
RECONSTRUCTED = 2000  # rows whose reconstruction is measured; more changes the third digit


@dataclass(frozen=True)
class Judge:
    """How far a model's samples are from the images that it is to resemble; less is better.

    `metric` names the number for its extractor. Every model it judges draws `samples` images of `seed`,
    and is compared with the same moments.
    """

    extract: Extractor
    real: Moments
    samples: int
    seed: int

    @property
    def metric(self) -> str:
        return self.extract.metric

    def distance(self, model: SamplingModel, sampler: str | None = None) -> float:
        drawn = model.stream(self.samples, self.seed, sampler=sampler)
        images = (torch.from_numpy(part).permute(0, 3, 1, 2) for part in drawn)
        return frechet_distance(self.real, moments_of(self.extract, images))


def build_judge(
    config: Config, images: ImageRows, extractor: str, samples: int, seed: int = 0, device: str = "cpu"
) -> Judge:
    """A judge by the Frechet distance to `images`, which are read once.

    Args:
        extractor: name of the feature extractor; the metric is named for it (`fd_lite0`, ...).
        samples: images drawn for the distance.
    """
    extract = build_extractor(extractor, load_weights, device)
    return Judge(extract, moments_of(extract, training_images(images, len(images), config)), samples, seed)


def evaluate(
    config: Config,
    manifest: Manifest,
    model: SamplingModel,
    *,
    seed: int = 0,
    device: str = "cpu",
    data: str | None = None,
    with_codes: bool = True,
) -> dict[str, float]:
    """Reconstruction error, and the Frechet distance of samples to the training images, for stage 2 and the baseline.

    Args:
        config: of the run; `evaluation` says which extractor and how many samples.
        manifest, model: what the run packaged, opened.
        data: where the images are, if not where they were for the training, or other images.
        with_codes: whether the checkpoints of the run are at hand; reconstruction needs its codes.
    Returns:
        Metric name -> value. `<fd>` is of G(T(e)); `<fd>_glo` of codes from a fitted Gaussian (GLO's sampling).
        Reconstruction error only where the codes are, and only of the images they are the codes of.
    Raises:
        UserError: the images are not those of the training.
    """
    config = moved(config, data)
    images = open_images(config)
    require_same(images, manifest, config, data)
    metrics = {}
    if with_codes and images.index.fingerprint == manifest.fingerprint:
        metrics = reconstruction(config, model, images)
    judge = build_judge(config, images, config.evaluation.extractor, config.evaluation.samples, seed, device)
    return metrics | {judge.metric: judge.distance(model), f"{judge.metric}_glo": judge.distance(model, "gaussian")}


def reconstruction(config: Config, model: SamplingModel, images: ImageRows) -> dict[str, float]:
    """L1 and PSNR between G(z_i) and x_i over the first rows."""
    store = open_store(config.checkpoint_url, config.s3)
    step = retention.latest(store)
    if step is None:
        raise UserError(f"no checkpoint in {store.url}: its latent codes are needed to measure reconstruction")
    rows = range(min(len(images), RECONSTRUCTED))
    z_ND = torch.from_numpy(reader.load_rows(store, step, rows)["z"])
    error, at = ReconstructionError(), 0
    for real_BCHW in training_images(images, len(rows), config):
        fake = torch.from_numpy(model.decode(z_ND[at : at + len(real_BCHW)])).permute(0, 3, 1, 2)
        error, at = error.update(fake, real_BCHW), at + len(real_BCHW)
    return error.metrics()


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


def require_same(images: ImageRows, manifest: Manifest, config: Config, given: str | None) -> None:
    """Refuse images that have another form than the model's and, unless they were asked for by address, other images.

    Raises:
        UserError: they do not fit.
    """
    require_fit(images.index, config.data, 1)
    if given is None and images.index.fingerprint != manifest.fingerprint:
        raise UserError(
            f"{config.data.url} holds other images than {manifest.name} was trained on; give them with --data URL"
        )
