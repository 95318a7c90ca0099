"""The packaged model of any checkpoint of a run, also of one that is in training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ...cluster.checkpoints.best import find_step
from ...cluster.checkpoints.layout import folder_name
from ...config.run import Config
from ...config.samplers import GaussianConfig
from ...config.sections import S3Config
from ...errors import UserError
from ...inference.model import DEFAULT_BATCH, SamplingModel, usable_device
from ...inference.package import ModelManifest, export_model, open_folder
from ...metrics.evaluate import codes_in
from ...metrics.team import ALONE
from ...reports.run_folder import CHECKPOINTS, CONFIG, MODEL, parse_config, read_config
from ...storage.base import MissingObject, Store
from ...storage.open import local_folder, open_store
from ...tracking.source import is_registered
from ..glo import GENERATOR, averaged_statistics
from ..networks import STATISTICS_OF
from ..prior import prior_codes
from ..sampler import MAPPING
from ..stage import final_weights
from .evaluation import gaussian_of
from .state import Saved, load_any


@dataclass(frozen=True)
class CheckpointModel:
    """The model of a checkpoint, the step of that, and the configuration of its run."""

    config: Config
    step: int
    manifest: ModelManifest
    model: SamplingModel


def export_saved(
    folder: Path, config: Config, saved: Saved, gaussian: dict[str, Tensor] | None, rows: int, fingerprint: str
) -> None:
    """Write the packaged model of a checkpoint; before stage 2 its own sampler is the Gaussian.

    Args:
        gaussian: state of the Gaussian over its codes, if there are any.
    Raises:
        UserError: weights or codes are not finite. EnvironmentFault: the disk is full or failing.
    """
    weights, sampler = final_weights(saved.networks[GENERATOR]), None
    if MAPPING in saved.networks:
        sampler = saved.networks[MAPPING]["weights"]
    elif not config.has_codes:
        sampler = {}
    else:
        config = config.model_copy(update={"sampler": GaussianConfig()})
    export_model(folder, config, weights, sampler, gaussian, rows, fingerprint)


def open_checkpoint(
    source: str | Path, which: str, *, s3: S3Config | None = None, device: torch.device | str = "cpu"
) -> CheckpointModel:
    """Load the model of a checkpoint. The run may be in training; its images are not needed.

    Args:
        source: a run folder, or its copy in S3, beside the checkpoints.
        which: `best`, `last`, or a step.
    Raises:
        UserError: no such run or checkpoint. DamagedCheckpoint: the checkpoint is damaged; none takes its place.
    """
    device = usable_device(device)
    config, store = run_at(source, s3)
    step = find_step(store, which)
    state, saved = load_any(store, step)
    rows = state["rows"]
    with_statistics(config, saved, store, step, rows, device)
    gaussian = gaussian_of(lambda part: codes_in(store, part, step), rows, ALONE) if config.has_codes else None
    with TemporaryDirectory(prefix="glann-model-") as scratch:
        export_saved(Path(scratch) / MODEL, config, saved, gaussian, rows, state["fingerprint"])
        manifest, model = open_folder(Path(scratch) / MODEL, f"{source} at {folder_name(step)}", device)
    return CheckpointModel(config, step, manifest, model)


def with_statistics(config: Config, saved: Saved, store: Store, step: int, rows: int, device: torch.device) -> None:
    """Complete an averaged generator with BatchNorm, whose statistics not all checkpoints hold."""
    generator = saved.networks[GENERATOR]
    averaged = generator.get("ema", {})
    if not averaged or not config.generator.normalises or averaged.keys() == generator["weights"].keys():
        return
    if config.has_codes:
        z_ND = torch.cat(list(codes_in(store, range(rows), step)))
    else:
        z_ND = prior_codes(config, min(rows, STATISTICS_OF))
    averaged |= averaged_statistics(config, generator, z_ND, DEFAULT_BATCH, device)


def run_at(source: str | Path, s3: S3Config | None = None) -> tuple[Config, Store]:
    """The configuration of a run, and the store of its checkpoints.

    Raises:
        UserError: not the folder of a run, nor its copy in S3.
    """
    if is_registered(source):
        raise UserError(f"{source} is a packaged model and has no checkpoints; give the folder of its run")
    folder = local_folder(str(source))
    if folder is not None:
        config = read_config(folder)
        return config, open_store(config.checkpoint_url, config.s3)
    url = str(source).rstrip("/")
    try:
        config = parse_config(open_store(url, s3 or S3Config()).read(CONFIG), f"{url}/{CONFIG}")
    except MissingObject as error:
        raise UserError(f"{url} is not the copy of a run folder: it has no {CONFIG}") from error
    return config, open_store(f"{url}/{CHECKPOINTS}", s3 or S3Config())
