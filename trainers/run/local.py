"""Training of the sampler alone on a shared stage 1: one process, in memory, much faster than a full run.

Shapes: N rows, D latent dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...cluster.checkpoints import reader, retention
from ...config.run import Config
from ...config.sections import EvaluationConfig
from ...datasets.index import Index
from ...errors import UserError
from ...inference.model import SamplingModel, usable_device
from ...inference.package import export_model, load_model
from ...metrics.evaluate import measure_codes, measured_metrics, reconstruction
from ...metrics.judge import Codes as CodeBlocks
from ...metrics.judge import Judge, build_judge
from ...metrics.panel import code_panel
from ...metrics.reference import held_out_images, open_images
from ...metrics.result import Result, by_key
from ...metrics.spec import measured_with
from ...reports.run_folder import MODEL, read_config
from ...samplers.base import Codes, build_sampler
from ...samplers.gaussian import gaussian
from ...storage.open import open_store
from ...tracking.runs import DataInput, TrackedRun
from ..glo import GENERATOR
from ..plan.devices import name_of
from ..stage import final_weights, stage_infos
from . import finish
from .evaluation import drawn_from, model_of
from .events import EpochDone
from .folder import is_finished, refuse_other_configuration, require_summary, take_back_tracking
from .hooks import Hooks
from .lifecycle import open_run
from .mirror import RunMirror, take_back
from .recovery import RunStopped
from .state import load

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class StageOne:
    """Results of a trained stage 1 that second stages share.

    generator: weights and buffers by name, of the moving average if there is one. z_ND: codes. results: those that do
    not depend on stage 2. judge: measures samples against the training images, and held-out ones if there are any.
    """

    generator: dict[str, Tensor]
    z_ND: Tensor
    index: Index
    results: list[Result]
    judge: Judge


def load_stage_one(run_dir: Path, evaluation: EvaluationConfig) -> StageOne:
    """Load stage 1 from the newest checkpoint of a run, measured as `evaluation` says.

    Raises:
        UserError: the run has not completed stage 1.
    """
    config = read_config(run_dir).model_copy(update={"evaluation": evaluation})
    store = open_store(config.checkpoint_url, config.s3)
    index, images = Index.load(config.data.url, config.s3), open_images(config)
    step = retention.latest(store)
    saved = None if step is None else load(store, step, index, len(images))
    if saved is None or step is None or saved.position.stage == next(iter(stage_infos(config))):
        raise UserError(
            f"{run_dir} has not completed stage 1; give a finished run, or let the study train one (recipe: ...)"
        )
    z_ND = torch.from_numpy(reader.load_rows(store, step, range(len(images)), ("z",))["z"])
    model = model_of(config, saved.networks, gaussian(z_ND), usable_device("auto"))
    measured = measured_with(evaluation.extractor, evaluation.metrics)
    held_out = held_out_images(config, images.index)
    judge = build_judge(config, images, measured, evaluation.samples, device=model.device, held_out=held_out)
    codes = code_blocks(z_ND)
    results = [*reconstruction(config, model, codes, images, measured), *judge.measure_floor()]
    results += judge.measure_reconstructions(model, codes, len(z_ND))
    return StageOne(final_weights(saved.networks[GENERATOR]), z_ND, index, results, judge)


def train_second_stage(config: Config, console: Console, hooks: Hooks, shared: StageOne) -> dict[str, float]:
    """Fit the sampler to the shared codes, then package, measure and track it like any run; returns its metrics.

    There are no checkpoints, as training is short: a stopped run restarts from the beginning.

    Raises:
        RunStopped: `hooks.stop` returned a reason. UserError: training diverged.
    """
    take_back(config)
    refuse_other_configuration(config)
    take_back_tracking(config)
    if is_finished(config):
        return require_summary(config)["metrics"]
    tags = {"glann.fingerprint": shared.index.fingerprint, **hooks.tags}
    index = shared.index
    data = DataInput(config.data.url, index.fingerprint, len(shared.z_ND), index.resolution, index.channels)
    with open_run(config, config.run_dir, "train", tags, hooks.parent_run_id, data) as tracked:
        metrics = _train(config, shared, tracked, hooks)
    RunMirror(config).close(console.print)
    console.print(f"{config.name} is trained and measured")
    return metrics


def _train(config: Config, shared: StageOne, tracked: TrackedRun, hooks: Hooks) -> dict[str, float]:
    began, rows = monotonic(), len(shared.z_ND)
    weights = fit_sampler(config, shared.z_ND, tracked, hooks)
    trained_s = monotonic() - began
    fingerprint = shared.index.fingerprint
    export_model(config.run_dir / MODEL, config, shared.generator, weights, gaussian(shared.z_ND), rows, fingerprint)
    model = load_model(config.run_dir, device="auto")
    results = [*shared.results, *measure_samples(config, model, shared)]
    timings = {"train_s": trained_s, "finish_s": monotonic() - began - trained_s}
    drawn = drawn_from(model, config.preview.images)
    last, hardware = sum(info.epochs for info in stage_infos(config).values()), f"1 x {name_of(model.device)}"
    finish.conclude(config, tracked, drawn, results, timings, shared.index, rows, hardware, last)
    return by_key(results)


def fit_sampler(config: Config, z_ND: Tensor, tracked: TrackedRun, hooks: Hooks) -> dict[str, Tensor]:
    """Fit the configured sampler in this process; returns its weights.

    Raises:
        RunStopped: `hooks.stop` returned a reason.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed + 1)
    sampler = build_sampler(
        config.sampler, config.generator.latent_dim, config.constraint, seed=config.seed, device=device
    )
    codes, stage = Codes(z_ND, range(len(z_ND)), len(z_ND)), config.sampler.kind
    for step in sampler.fit(codes, 0, lambda: torch.zeros(0)):
        if why := hooks.stop():
            raise RunStopped(f"{why}; the next command restarts it from the beginning")
        if step.epoch_facts is not None:
            epoch, facts = step.epoch + 1, dict(step.epoch_facts)
            tracked.log_metrics({"stage": stage, "epoch": epoch} | facts, epoch)
            hooks.notify(EpochDone(stage, epoch, epoch, facts))
    return sampler.state()["weights"]


def measure_samples(config: Config, model: SamplingModel, shared: StageOne) -> list[Result]:
    """The metrics of the model's samples and of its codes."""
    results = shared.judge.measure(model)
    codes, rows = code_blocks(shared.z_ND), len(shared.z_ND)
    panel = code_panel(measured_metrics(config))
    return results + measure_codes(panel, model, codes, rows, config.evaluation.samples)


def code_blocks(z_ND: Tensor) -> CodeBlocks:
    """The codes as one block of any rows."""
    return lambda rows: iter([z_ND[rows.start : rows.stop]])
