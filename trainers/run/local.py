"""Stage 2 alone, on a stage 1 that many runs share: one process, in memory, minutes become seconds.

Shapes: N rows, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...cluster.checkpoints import reader, retention
from ...config.run import Config
from ...datasets.assets.catalogue import load_weights
from ...datasets.index import Index
from ...errors import UserError
from ...inference.model import SamplingModel
from ...inference.package import export_model, load_model
from ...metrics.evaluate import open_images, reconstruction, training_images
from ...metrics.features.extractor import build_extractor
from ...metrics.frechet import Moments, frechet_distance, moments_of
from ...models.mapping import build_mapping
from ...reports.run_folder import MODEL, read_config, write_config
from ...samplers.imle import MappingTrainer, train_imle
from ...storage.open import open_store
from ...tracking.runs import Status, TrackedRun
from . import finish
from .folder import is_finished, refuse_other_configuration, require_summary, take_back_tracking
from .hooks import Supervision
from .mailbox import NOTHING, STOP
from .preflight import sole_command
from .recovery import RunStopped
from .state import final_weights, load

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class StageOne:
    """What a trained stage 1 gives to every second stage.

    generator: weights and buffers by name, of the moving average where there is one. z_ND: codes. metrics: what
    does not depend on stage 2. real: moments of the real images' features, of the run's extractor.
    """

    generator: dict[str, Tensor]
    z_ND: Tensor
    index: Index
    metrics: dict[str, float]
    real: Moments


def load_stage_one(run_dir: Path, extractor: str) -> StageOne:
    """From the newest checkpoint of a run that has done stage 1.

    Raises:
        UserError: it has not.
    """
    config = read_config(run_dir)
    store = open_store(config.checkpoint_url, config.s3)
    index, images = Index.load(config.data.url, config.s3), open_images(config)
    step = retention.latest(store)
    saved = None if step is None else load(store, step, index, len(images))
    if saved is None or step is None or saved.generator is None or saved.position.stage == "glo":
        raise UserError(
            f"{run_dir} has not done stage 1; give a finished run, or let the study train one (recipe: ...)"
        )
    z_ND = torch.from_numpy(reader.load_rows(store, step, range(len(images)))["z"])
    model = load_model(run_dir, s3=config.s3)
    extract = build_extractor(extractor, load_weights)
    real = moments_of(extract, training_images(images, len(images), config))
    metrics = reconstruction(config, model, images)
    return StageOne(final_weights(saved.generator), z_ND, index, metrics, real)


def train_second_stage(
    config: Config, console: Console, supervision: Supervision, shared: StageOne
) -> dict[str, float]:
    """Train T on the shared codes, package, measure and track it like any run; its metrics.

    Too short to be saved on the way: one that was stopped begins anew.

    Raises:
        RunStopped: `supervision` wanted it. UserError: values that do not train.
    """
    refuse_other_configuration(config)
    take_back_tracking(config)
    if is_finished(config):
        return require_summary(config)["metrics"]
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with sole_command(config.run_dir, "train"):
        write_config(config.run_dir, config)
        tags = {"glann.fingerprint": shared.index.fingerprint, **supervision.tags}
        tracked = TrackedRun.open(config, config.run_dir, tags, parent_run_id=supervision.parent_run_id)
        status: Status = "FAILED"
        try:
            metrics = _train(config, shared, tracked, supervision)
            status = "FINISHED"
        except RunStopped:
            status = "KILLED"
            raise
        finally:
            tracked.finish(status)
    console.print(f"{config.name} is trained and measured")
    return metrics


def _train(config: Config, shared: StageOne, tracked: TrackedRun, supervision: Supervision) -> dict[str, float]:
    began = monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed + 1)
    mapping = build_mapping(config.imle, config.generator.latent_dim, config.glo.constraint)
    trainer = MappingTrainer(mapping, config, device)
    rows = len(shared.z_ND)
    why = ""

    def vote() -> float:
        nonlocal why
        why = why or supervision.stop()
        return STOP if why else NOTHING

    for done in train_imle(config, shared.z_ND, range(rows), rows, trainer, 0, vote, bool):
        numbers = {"loss": done.loss, "distance": done.distance, "recall": done.recall}
        tracked.log_metrics({"stage": "imle", "epoch": done.epoch + 1} | numbers, done.epoch + 1)
        supervision.hear({"kind": "epoch", "stage": "imle", "epoch": done.epoch + 1} | numbers)
    if why:
        raise RunStopped(f"{why}; it begins anew with the next command")
    trained_s = monotonic() - began
    weights = trainer.state()["weights"]
    fingerprint = shared.index.fingerprint
    export_model(config.run_dir / MODEL, config, shared.generator, weights, shared.z_ND, fingerprint)
    model = load_model(config.run_dir)
    metrics = shared.metrics | distances(config, model, shared.real)
    timings = {"train_s": trained_s, "finish_s": monotonic() - began - trained_s}
    drawn = finish.drawn_from(model, config.preview.images)
    finish.conclude(config, tracked, drawn, metrics, timings, shared.index, rows)
    return metrics


def distances(config: Config, model: SamplingModel, real: Moments) -> dict[str, float]:
    """The Frechet distance of the model's samples to the real images."""
    extract = build_extractor(config.evaluation.extractor, load_weights)

    def drawn() -> Iterator[Tensor]:
        for part_NHWC in model.stream(config.evaluation.samples):
            yield torch.from_numpy(part_NHWC).permute(0, 3, 1, 2)

    return {extract.metric: frechet_distance(real, moments_of(extract, drawn()))}
