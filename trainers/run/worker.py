"""What runs on every worker: both stages from the last checkpoint on, saving and reporting as it goes.

Shapes: B rows of a batch, D latent dimension, n rows of this worker.
"""

from __future__ import annotations

import math
from functools import partial
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from ...cluster.checkpoints import layout, retention, writer
from ...cluster.checkpoints.lease import Ticket, require
from ...cluster.latents import LatentTable
from ...cluster.placement import ranges
from ...config.run import Config
from ...datasets.reader import ImageRows
from ...models.generators import build_generator
from ...models.mapping import build_mapping
from ...samplers.imle import ImleEpoch, MappingTrainer, train_imle
from ...storage.open import open_store
from ..engine.build import build_engine
from ..engine.step import Engine
from ..glo import GloStep, train_glo
from ..objective import build_objective
from ..plan.devices import peak_of
from ..plan.estimate import training_costs
from .mailbox import NOTHING, SAVE, STOPPED, Reporter, saves, stops
from .previews import Previews
from .state import Position, Saved, final_weights, load, restore_rows

TABLE_WATCH_S = 5.0  # a table that nobody asks is lost unnoticed until the next checkpoint wants it


class Stopped(Exception):
    """The driver asked the workers to stop, and the run has been saved."""


def train_worker(task: dict[str, Any]) -> str | None:
    """Entry point of a Ray Train worker; `task` holds the configuration, the driver's mailbox and the group's number.

    Returns:
        `STOPPED` if it was asked to. Errors are the driver's to judge (`recovery.verdict`).
    """
    import ray
    import ray.train
    from ray.train.torch import get_device

    config = Config.model_validate(task["config"])
    reporter = Reporter(task["mailbox"], ray.train.get_context().get_world_rank(), task["group"])
    reporter.send("joined", node=ray.get_runtime_context().get_node_id())
    try:
        Worker(config, reporter, get_device(), task["lease"]).run()
    except Stopped:
        return STOPPED
    return None


class Worker:
    """One worker's part of a run: its rows, their codes, and its replica or shard of the networks."""

    def __init__(self, config: Config, reporter: Reporter, device: torch.device, lease: Ticket) -> None:
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
        self.writer = writer.CheckpointWriter(
            self.store,
            self.rank,
            self.world,
            keep=config.checkpoint.keep,
            timeout=config.checkpoint.timeout_s,
            fence=lambda: require(self.store, lease),
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
        self.saved_at = self.table_seen_at = monotonic()

    def run(self) -> None:
        """Do what is left of the run."""
        self.saved = self.resume()
        if self.saved.position.stage == "glo":
            self.stage_one()
        if self.saved.position.stage == "imle":
            self.stage_two()
        self.writer.wait()

    # Stage 1 ---------------------------------------------------------------------------------

    def stage_one(self) -> None:
        """GLO: codes and generator."""
        config, saved, position = self.config, self.saved, self.saved.position
        torch.manual_seed(config.seed)
        network = build_generator(config.generator, config.data.resolution, config.data.channels)
        network.checkpoint_activations = config.engine.activation_checkpointing
        engine = build_engine(network, config, self.device, saved.generator)
        loss = build_objective(config, self.device)
        peak = peak_of(self.device, config.engine)
        flops = sum(part.flops for part in training_costs(config)) if peak else 0
        meter = Meter(flops, peak and peak * self.world)
        start = (position.epoch, position.step)
        self.reporter.enter("glo")
        for step in train_glo(config, self.images, self.latents, engine, loss, start, self.vote):
            self.reporter.enter("glo")
            position.epoch, position.step, position.serial = step.epoch, step.step + 1, position.serial + 1
            meter.add(step.loss, len(step.rows_B) * self.world)
            self.report_step(step, meter)
            if step.step + 1 == step.steps:
                position.epoch, position.step = step.epoch + 1, 0
                self.end_of_glo_epoch(step, engine, meter)
                meter = Meter(meter.flops, meter.peak)
            if saving := saves(step.votes) or self.due(position):
                saved.generator = engine.live()
                self.save(stop=stops(step.votes, saving))
        saved.generator = engine.state()
        # a serial of its own: a checkpoint of the last step may exist already, and would be kept
        position.stage, position.epoch, position.step, position.serial = "imle", 0, 0, position.serial + 1
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
                latent_lr=step.latent_lr,
                **meter.speed(),
            )

    def end_of_glo_epoch(self, step: GloStep, engine: Engine, meter: Meter) -> None:
        if self.rank == 0:
            self.reporter.send(
                "epoch",
                stage="glo",
                epoch=step.epoch + 1,
                step=self.saved.position.serial,
                loss=meter.loss(),
                seconds=meter.seconds(),
                latent_lr=step.latent_lr,
                **meter.speed(),
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
        config, saved, position = self.config, self.saved, self.saved.position
        torch.manual_seed(config.seed + 1)
        mapping = build_mapping(config.imle, config.generator.latent_dim, config.glo.constraint)
        trainer = MappingTrainer(mapping, config, self.device, saved.mapping)
        z_nD = self.latents.codes()
        began = monotonic()
        rows, ends = len(self.images), partial(stops, saving=False)
        for epoch in train_imle(
            config, z_nD, self.rows, rows, trainer, position.epoch, self.vote, ends, self.report_imle
        ):
            position.epoch, position.serial = epoch.epoch + 1, position.serial + 1
            saved.mapping = trainer.state()
            last = position.epoch == config.imle.epochs
            if self.rank == 0:
                self.end_of_imle_epoch(epoch, monotonic() - began, last)
            began = monotonic()
            if last:
                position.stage = "done"
            if saving := last or saves(epoch.votes) or self.due(position):
                self.save(stop=stops(epoch.votes, saving) and not last)
        if position.stage != "done":  # stopped within an epoch: what is saved is its beginning
            self.save(stop=True)

    def report_imle(self, phase: str, epoch: int, step: int) -> None:
        self.reporter.enter(phase)
        if monotonic() - self.table_seen_at > TABLE_WATCH_S:  # stage 2 works on a copy of its codes
            self.latents.take(())
            self.table_seen_at = monotonic()
        if self.rank == 0 and phase == "imle":
            steps = math.ceil(len(self.images) / self.config.imle.batch_size)
            self.reporter.progress(stage="imle", epoch=epoch, step=step, steps=steps)

    def end_of_imle_epoch(self, epoch: ImleEpoch, seconds: float, last: bool) -> None:
        saved, position = self.saved, self.saved.position
        self.reporter.send(
            "epoch",
            stage="imle",
            epoch=position.epoch,
            step=position.serial,
            loss=epoch.loss,
            distance=epoch.distance,
            search_seconds=epoch.search_seconds,
            recall=epoch.recall,
            seconds=seconds,
        )
        drawn = last or position.epoch % (2 * self.config.preview.every_epochs) == 0
        if drawn and saved.generator and saved.mapping:
            pictures = self.previews.imle(final_weights(saved.generator), saved.mapping["weights"])
            self.reporter.send("preview", stage="imle", epoch=position.epoch, pictures=pictures)

    # Saving and going on ---------------------------------------------------------------------

    def vote(self) -> float:
        """What this worker knows to be wanted: rank 0 watches the clock for all, any may hear from the driver."""
        asked = self.reporter.asked()
        minutes = (monotonic() - self.saved_at) / 60
        return asked + (SAVE if self.rank == 0 and minutes >= self.config.checkpoint.every_minutes else NOTHING)

    def due(self, position: Position) -> bool:
        every = self.config.checkpoint.every_epochs
        return every is not None and position.step == 0 and position.epoch % every == 0

    def save(self, stop: bool = False) -> None:
        """Begin a checkpoint of where the run stands, on every worker; with `stop`, finish it and stop."""
        began = monotonic()
        self.reporter.enter("saving")
        self.writer.save(
            self.saved.position.serial,
            tensors=self.saved.files(),
            latents=self.latents,
            state=self.saved.state(self.images.index, len(self.images), self.config),
        )
        if stop:
            self.writer.wait()
            raise Stopped
        self.saved_at = monotonic()
        if self.rank == 0:
            self.reporter.send("checkpoint", stall_s=self.saved_at - began)

    def resume(self) -> Saved:
        """What the newest checkpoint that can be read holds, or the start. A damaged one is passed over and told."""
        steps, faults = iter(self.usable() if self.rank == 0 else ()), dict[int, str]()
        finders: dict[int, int] = {}  # of the damage in each step: the first worker that met it
        while (serial := self.agreed(next(steps, -1))) >= 0:
            try:
                saved = load(self.store, serial, self.images.index, len(self.images))
                restore_rows(self.store, serial, self.latents, self.rows, saved.position)
            except layout.DamagedCheckpoint as error:
                faults[serial] = str(error)
            if (finder := self.first(serial in faults)) is None:
                for step in (step for step, finder in finders.items() if finder == self.rank):
                    layout.mark_damaged(self.store, step, faults[step])  # an older one is good: nothing is lost
                    self.reporter.send("damaged", step=step, reason=faults[step])
                if self.rank == 0:
                    self.reporter.send("resumed", **vars(saved.position))
                return saved
            finders[serial] = finder
        if finders:
            raise retention.none_left(self.store, faults or {0: f"worker {finder} found them damaged"})
        return Saved(Position())

    def usable(self) -> list[int]:
        """The steps that may be resumed from, newest first; what is damaged at first sight is told."""
        steps, damaged = retention.usable(self.store)
        for step, reason in damaged.items():
            self.reporter.send("damaged", step=step, reason=reason)
        return steps

    def first(self, flag: bool) -> int | None:
        """The lowest rank on which it is true."""
        told = torch.tensor(self.rank if flag else self.world, device=self.device)
        if self.world > 1:
            dist.all_reduce(told, dist.ReduceOp.MIN)
        return int(told) if told < self.world else None

    def agreed(self, number: int) -> int:
        """Rank 0's number, on every worker."""
        if self.world == 1:
            return number
        told = torch.tensor(number, device=self.device)
        dist.broadcast(told, 0)
        return int(told)


class Meter:
    """Mean loss and throughput since it was made; utilisation where the peak of the devices is known."""

    def __init__(self, flops: int = 0, peak: float | None = None) -> None:
        """`flops`: of an image, forward and backward. `peak`: FLOP/s of all workers' devices together."""
        self.flops, self.peak = flops, peak
        self.began, self.losses, self.steps, self.images = monotonic(), 0.0, 0, 0

    def add(self, loss: float, images: int) -> None:
        if math.isfinite(loss):
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

    def speed(self) -> dict[str, float]:
        """Images/s, and the model FLOP utilisation (MFU) that this is."""
        speed = {"images_per_s": self.rate()}
        return speed | {"mfu": self.rate() * self.flops / self.peak} if self.peak else speed
