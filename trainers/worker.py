"""What runs on every worker: both stages from the last checkpoint on, saving and reporting as it goes.

Shapes: B rows of a batch, D latent dimension, n rows of this worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..cluster import checkpoints
from ..cluster.latents import LatentTable
from ..cluster.placement import ranges
from ..config import Config
from ..datasets.assets import PERCEPTUAL, load_weights
from ..datasets.reader import ImageRows
from ..datasets.storage import open_store
from ..errors import UserError
from ..models.generators import build_generator
from ..models.losses import build_loss
from ..models.mapping import build_mapping
from ..models.perceptual import build_features
from .engine import Engine, build_engine
from .glo import GloStep, train_glo
from .imle import MappingTrainer, train_imle
from .mailbox import Reporter
from .previews import Previews

SAVE, STOP = 1.0, 1000.0  # what a worker may vote for; the votes of all are added


@dataclass
class Position:
    """Where a run stands: the next thing to do is `step` of `epoch` of `stage`; `serial` counts work done."""

    stage: str = "glo"
    epoch: int = 0
    step: int = 0
    serial: int = 0


class Stopped(Exception):
    """The user or the system asked the run to stop, and it has been saved."""


def train_worker(task: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; `task` holds the configuration and the driver's mailbox."""
    import ray.train
    from ray.train.torch import get_device

    config = Config.model_validate(task["config"])
    reporter = Reporter(task["mailbox"], ray.train.get_context().get_world_rank())
    try:
        Worker(config, reporter, get_device()).run()
    except UserError as error:
        reporter.fatal(error)  # trying again would not help: the driver ends the run
        raise
    except Stopped:
        reporter.send("stopped")


class Worker:
    """One worker's part of a run: its rows, their codes, and its replica or shard of the networks."""

    def __init__(self, config: Config, reporter: Reporter, device: torch.device) -> None:
        self.config, self.reporter, self.device = config, reporter, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.images = ImageRows(
            config.data.url,
            config.s3,
            cache_dir=config.data.cache_dir,
            cache_gb=config.data.cache_gb,
            max_rows=config.data.max_rows,
        )
        self.rows = ranges(len(self.images), self.world)[self.rank]
        self.store = open_store(config.checkpoint_url, config.s3)
        self.writer = checkpoints.CheckpointWriter(
            self.store, self.rank, self.world, keep=config.checkpoint.keep, timeout=config.checkpoint.timeout_s
        )
        self.latents = LatentTable.spawn(
            self.rows,
            config.generator.latent_dim,
            config.seed,
            optimizer=config.glo.latent_optimizer,
            betas=config.glo.betas,
            constraint=config.glo.constraint,
        )
        self.previews = Previews(config, self.images, self.rows, self.device)
        self.saved_at = monotonic()

    def run(self) -> None:
        """Do what is left of the run."""
        self.resume()
        if self.position.stage == "glo":
            self.stage_one()
        if self.position.stage == "imle":
            self.stage_two()
        self.writer.wait()

    # Stage 1 ---------------------------------------------------------------------------------

    def stage_one(self) -> None:
        """GLO: codes and generator."""
        config, position = self.config, self.position
        torch.manual_seed(config.seed)
        network = build_generator(config.generator, config.data.resolution, config.data.channels)
        network.checkpoint_activations = config.engine.activation_checkpointing
        engine = build_engine(network, config, self.device, self.generator_state)
        loss = perceptual_loss(config, self.device)
        meter = Meter(len(self.images))
        start = (position.epoch, position.step)
        for step in train_glo(config, self.images, self.latents, engine, loss, start, self.vote):
            position.epoch, position.step, position.serial = step.epoch, step.step + 1, position.serial + 1
            meter.add(step.loss, len(step.rows_B) * self.world)
            self.report_step(step, meter)
            if step.step + 1 == step.steps:
                position.epoch, position.step = step.epoch + 1, 0
                self.end_of_glo_epoch(step, engine, meter)
                meter = Meter(len(self.images))
            if step.votes >= SAVE or self.due(position):
                self.generator_state = engine.state()
                self.save(wait=step.votes >= STOP)
        self.generator_state = engine.state()
        position.stage, position.epoch, position.step = "imle", 0, 0
        self.save()

    def report_step(self, step: GloStep, meter: Meter) -> None:
        if not step.applied:
            self.reporter.send("bad_step", epoch=step.epoch, step=step.step, rows=step.rows_B)
        if self.rank == 0:
            self.reporter.progress(
                stage="glo",
                epoch=step.epoch,
                step=step.step,
                steps=step.steps,
                loss=step.loss,
                images_per_s=meter.rate(),
                latent_lr=step.latent_lr,
            )

    def end_of_glo_epoch(self, step: GloStep, engine: Engine, meter: Meter) -> None:
        if self.rank == 0:
            self.reporter.send(
                "epoch",
                stage="glo",
                epoch=step.epoch + 1,
                step=self.position.serial,
                loss=meter.loss(),
                images_per_s=meter.rate(),
                seconds=meter.seconds(),
                latent_lr=step.latent_lr,
            )
        last = step.epoch + 1 == self.config.glo.epochs
        if last or (step.epoch + 1) % self.config.preview.every_epochs == 0:
            weights = engine.weights()  # collective: every worker holds a part
            if self.rank == 0:
                pictures = self.previews.glo(weights, self.latents)
                self.reporter.send("preview", stage="glo", epoch=step.epoch + 1, pictures=pictures)

    # Stage 2 ---------------------------------------------------------------------------------

    def stage_two(self) -> None:
        """IMLE: the mapping from noise to codes. The generator is done and only travels along."""
        config, position = self.config, self.position
        torch.manual_seed(config.seed + 1)
        mapping = build_mapping(config.imle, config.generator.latent_dim)
        trainer = MappingTrainer(mapping, config, self.device, self.mapping_state)
        z_nD = self.latents.codes()
        began = monotonic()
        for epoch in train_imle(config, z_nD, self.rows, len(self.images), trainer, position.epoch, self.vote):
            position.epoch, position.serial = epoch.epoch + 1, position.serial + 1
            self.mapping_state = trainer.state()
            last = position.epoch == config.imle.epochs
            if self.rank == 0:
                self.reporter.send(
                    "epoch",
                    stage="imle",
                    epoch=position.epoch,
                    step=position.serial,
                    loss=epoch.loss,
                    distance=epoch.distance,
                    search_seconds=epoch.search_seconds,
                    seconds=monotonic() - began,
                )
                if last or position.epoch % (2 * config.preview.every_epochs) == 0:
                    weights = self.generator_state.get("ema") or {}
                    weights = self.generator_state["weights"] | weights
                    pictures = self.previews.imle(weights, self.mapping_state["weights"])
                    self.reporter.send("preview", stage="imle", epoch=position.epoch, pictures=pictures)
            began = monotonic()
            if last:
                position.stage = "done"
            if last or epoch.votes >= SAVE or self.due(position):
                self.save(wait=epoch.votes >= STOP and not last)

    # Saving and going on ---------------------------------------------------------------------

    def vote(self) -> float:
        """Rank 0 watches the clock for all, any worker may have been told to stop."""
        if self.reporter.stop_requested():
            return STOP
        minutes = (monotonic() - self.saved_at) / 60
        return SAVE if self.rank == 0 and minutes >= self.config.checkpoint.every_minutes else 0.0

    def due(self, position: Position) -> bool:
        every = self.config.checkpoint.every_epochs
        return every is not None and position.step == 0 and position.epoch % every == 0

    def save(self, wait: bool = False) -> None:
        """Begin a checkpoint of where the run stands; with `wait`, finish it and stop."""
        began = monotonic()
        tensors = networks(self.generator_state, self.mapping_state) if self.rank == 0 else None
        state = {
            "position": vars(self.position),
            "generator_updates": self.generator_state["updates"],
            "mapping_updates": self.mapping_state["updates"] if self.mapping_state else None,
            "rows": len(self.images),
            "fingerprint": self.images.index.fingerprint,
            "seed": self.config.seed,
        }
        self.writer.save(
            self.position.serial,
            tensors=tensors,
            latents=(self.rows.start, self.latents.snapshot()),
            state=state if self.rank == 0 else None,
        )
        if wait:
            self.writer.wait()
            raise Stopped
        self.saved_at = monotonic()
        if self.rank == 0:
            self.reporter.send("checkpoint", step=self.position.serial, stall_seconds=self.saved_at - began)

    def resume(self) -> None:
        """Take over the newest complete checkpoint, or start."""
        self.position, self.generator_state, self.mapping_state = Position(), None, None
        serial = self.agreed(checkpoints.latest(self.store) if self.rank == 0 else None)
        if serial is None:
            return
        state = checkpoints.load_state(self.store, serial)
        refuse_other_data(state, self.images)
        self.position = Position(**state["position"])
        self.generator_state, self.mapping_state = load_networks(self.store, serial, state)
        latents = checkpoints.load_rows(self.store, serial, self.rows)
        self.latents.restore(latents, (self.position.epoch, self.position.step - 1))
        if self.rank == 0:
            self.reporter.send("resumed", **vars(self.position))

    def agreed(self, serial: int | None) -> int | None:
        """Rank 0's answer, on every worker."""
        if self.world == 1:
            return serial
        number = torch.tensor(-1 if serial is None else serial, device=self.device)
        dist.broadcast(number, 0)
        return None if number < 0 else int(number)


class Meter:
    """Mean loss and throughput since it was made."""

    def __init__(self, rows: int) -> None:
        self.began, self.losses, self.images = monotonic(), 0.0, 0
        self.steps = 0

    def add(self, loss: float, images: int) -> None:
        if np.isfinite(loss):
            self.losses += loss
            self.steps += 1
        self.images += images

    def loss(self) -> float:
        return self.losses / self.steps if self.steps else float("nan")

    def seconds(self) -> float:
        return monotonic() - self.began

    def rate(self) -> float:
        """Images per second of all workers."""
        return self.images / max(self.seconds(), 1e-9)


def perceptual_loss(config: Config, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The configured loss on `device`, as a function of (fake, real, patch seeds)."""
    features = None
    if config.loss.kind == "perceptual":
        names = [config.loss.weights] if config.loss.weights else PERCEPTUAL[config.loss.network]
        weights, convention = load_weights(*names)
        features = build_features(config.loss.network, weights, convention)
    loss = build_loss(config.loss, config.data.resolution, features).to(device)
    bf16 = config.engine.precision == "bf16"

    def loss_of(fake_BCHW: Tensor, real_BCHW: Tensor, seed_B: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return loss(fake_BCHW, real_BCHW, seed_B).float()

    return torch.compile(loss_of) if config.engine.compile else loss_of


def networks(generator: dict[str, Any], mapping: dict[str, Any] | None) -> dict[str, dict[str, Tensor]]:
    """The tensor files of a checkpoint, by name."""
    files = {"generator": generator["weights"]}
    files |= {f"generator-{key}": generator[key] for key in ("ema", "exp_avg", "exp_avg_sq") if key in generator}
    if mapping is not None:
        files["mapping"] = mapping["weights"]
        files |= {f"mapping-{key}": mapping[key] for key in ("exp_avg", "exp_avg_sq")}
    return files


def load_networks(store: Any, serial: int, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The other way round: states of the generator's engine and of the mapping's trainer."""

    def load(name: str) -> dict[str, Tensor]:
        return checkpoints.load_tensors(store, serial, name)

    generator: dict[str, Any] = {"weights": load("generator"), "updates": state["generator_updates"]}
    files = checkpoints.names(store, serial)
    for key in ("ema", "exp_avg", "exp_avg_sq"):
        if f"generator-{key}" in files:
            generator[key] = load(f"generator-{key}")
    if state["mapping_updates"] is None:
        return generator, None
    mapping = {"weights": load("mapping"), "updates": state["mapping_updates"]}
    mapping |= {key: load(f"mapping-{key}") for key in ("exp_avg", "exp_avg_sq")}
    return generator, mapping


def refuse_other_data(state: dict[str, Any], images: ImageRows) -> None:
    """A code belongs to its image: a run cannot go on with other data."""
    if state["rows"] != len(images) or state["fingerprint"] != images.index.fingerprint:
        raise UserError(
            f"the checkpoint was made with other data ({state['rows']} rows, fingerprint {state['fingerprint'][:12]}) "
            f"than data.url holds ({len(images)} rows, {images.index.fingerprint[:12]}); use another run name"
        )
