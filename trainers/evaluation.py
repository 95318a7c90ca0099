"""How good a run is: how well it reconstructs its images, and how close its samples are to them.

Shapes: B batch, C, H, W channels, height, width, N rows, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..cluster import checkpoints
from ..cluster.placement import ranges
from ..config import Config, validate
from ..datasets.assets import load_weights
from ..datasets.loader import BadRows, PlannedBatch, batches
from ..datasets.reader import ImageRows
from ..datasets.storage import open_store
from ..errors import UserError
from ..faults import plain_data
from ..metrics.extractors import build_extractor
from ..metrics.frechet import frechet_of_images
from ..metrics.reconstruction import ReconstructionError
from ..tracking.packaged import load_model
from ..tracking.sampling import SamplingModel

BATCH = 100
RECONSTRUCTED = 2000  # rows whose reconstruction is measured; more changes the third digit


def evaluate(run_dir: Path, extractor: str, samples: int, seed: int = 0, device: str = "cpu") -> dict[str, float]:
    """Reconstruction error, and the Frechet distance of samples to the training images, for stage 2 and the baseline.

    Args:
        extractor: name of the feature extractor; the metric is named for it (`fd_lite0`, ...).
        samples: images drawn for the distance.
    Returns:
        Metric name -> value. `<fd>` is of G(T(e)); `<fd>_glo` of codes from a fitted Gaussian (GLO's sampling).
    Raises:
        UserError: no finished run there.
    """
    config = run_config(run_dir)
    model = load_model(run_dir, s3=config.s3, device=device)
    images = open_images(config)
    extract = build_extractor(extractor, load_weights, device)
    real = list(training_images(images, len(images), config))
    metrics = reconstruction(config, model, images)
    for method, suffix in (("imle", ""), ("glo", "_glo")):
        drawn = (torch.from_numpy(part).permute(0, 3, 1, 2) for part in model.stream(samples, seed, method=method))  # type: ignore[arg-type]
        distances = frechet_of_images(extract, real, drawn)
        metrics |= {f"{name}{suffix}": value for name, value in distances.items()}
    return metrics


def reconstruction(config: Config, model: SamplingModel, images: ImageRows) -> dict[str, float]:
    """L1 and PSNR between G(z_i) and x_i over the first rows."""
    store = open_store(config.checkpoint_url, config.s3)
    step = checkpoints.latest(store)
    if step is None:
        raise UserError(f"no checkpoint in {store.url}: its latent codes are needed to measure reconstruction")
    rows = range(min(len(images), RECONSTRUCTED))
    z_ND = torch.from_numpy(checkpoints.load_rows(store, step, rows)["z"])
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


def run_config(run_dir: Path) -> Config:
    """The configuration that a run folder was made with.

    Raises:
        UserError: not a run folder.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml; give one such as runs/digits")
    try:
        return validate(plain_data(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}") from error
