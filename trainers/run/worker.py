"""Training loop of a worker: runs the stages from the last checkpoint, saves and reports.

Shapes: B rows of a batch, n rows of this worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from time import monotonic
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from ...cluster.checkpoints import layout, retention, writer
from ...cluster.checkpoints.best import LAST, Best, find_step, usable_best
from ...cluster.checkpoints.lease import Ticket, require
from ...cluster.latents import LatentTable
from ...cluster.placement import ranges
from ...config.run import Config
from ...datasets.reader import ImageRows
from ...errors import EnvironmentFault
from ...metrics.result import Result, by_key
from ...models.comm import rank, world_size
from ...storage.open import open_store
from ..objective import loss_weights
from ..plan.devices import peak_of
from ..stage import DONE, Stage, StageContext, StageStep, State, stage_infos, stages_of
from .control import Control, Request
from .device_use import SAMPLE_EVERY_S, DeviceSampler
from .evaluation import EVALUATION, evaluate_trained
from .events import (
    BadStep,
    CheckpointDamaged,
    CheckpointSaved,
    CheckpointStarted,
    EpochDone,
    Evaluating,
    Joined,
    Measured,
    Preview,
    Progress,
    Resumed,
    StepsDone,
    Warned,
)
from .heartbeat import repeated
from .mailbox import STOPPED, Reporter, interval
from .measuring import Interim
from .meter import Meter
from .state import Position, Saved, load, restore_rows, share_networks


class Stopped(Exception):
    """The driver requested a stop, and the run has been saved."""


def no_score() -> Best | None:
    """Of a checkpoint that is not measured."""
    return None


def train_worker(task: dict[str, Any]) -> str | None:
    """Entry point of a Ray Train worker; `task` holds the configuration, the driver's mailbox and the group's number.

    Returns:
        `STOPPED` if it stopped on request. Errors are classified by the driver (`failures.classify_failure`).
    """
    import ray
    import ray.train
    from ray.train.torch import get_device

    config = Config.model_validate(task["config"])
    context = ray.train.get_context()
    workers = context.get_world_size()
    reporter = Reporter(task["mailbox"], context.get_world_rank(), task["group"], workers)
    reporter.send(Joined(ray.get_runtime_context().get_node_id()))
    device = get_device()
    sampler = DeviceSampler(reporter.rank, device, config.cluster.cpus_per_worker, reporter.post)
    with repeated(sampler, interval(SAMPLE_EVERY_S, workers), "device-use"):
        try:
            Worker(config, reporter, device, task["lease"]).run()
        except Stopped:
            return STOPPED
    return None


def table_of(config: Config, rows: range) -> LatentTable:
    """The codes of a worker's rows in an actor; an empty table for a method without codes."""
    if not config.has_codes:
        return LatentTable.in_process(range(0), 1, config.seed)
    if config.trainer != "glo":
        return LatentTable.spawn(
            rows, config.generator.latent_dim, config.seed, optimizer="none", constraint=config.constraint
        )
    return LatentTable.spawn(
        rows,
        config.generator.latent_dim,
        config.seed,
        optimizer=config.glo.latent_optimizer,
        betas=config.glo.betas,
        constraint=config.glo.constraint,
        batch=config.glo.batch_size,
        init_scale=config.glo.init_scale,
    )


class Worker:
    """One worker's part of a run: its rows, their codes, and its replica or shard of the networks."""

    def __init__(self, config: Config, reporter: Reporter, device: torch.device, lease: Ticket) -> None:
        self.config, self.reporter, self.device = config, reporter, device
        self.rank, self.world = rank(), world_size()
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
            on_commit=lambda step: reporter.post(CheckpointSaved(step)),
        )
        self.latents = table_of(config, self.rows)
        self.infos, self.loss_weights = stage_infos(config), loss_weights(config)
        self.interim = Interim(config, self.images, device)
        self.control = Control(reporter.requested, self.save_due)
        self.saved_at = monotonic()

    def run(self) -> None:
        """Train the remaining stages from the position of the last checkpoint, then evaluate."""
        self.saved = self.resume()
        context = StageContext(self.config, self.images, self.latents, self.device, self.reporter.enter)
        names = [*self.infos, DONE]
        left = names.index(self.saved.position.stage)
        for name, kind in list(zip(names, stages_of(self.config), strict=False))[left:]:
            self.train(name, kind(context, self.saved.networks), following=names[names.index(name) + 1])
        self.writer.wait()
        self.evaluate()

    def evaluate(self) -> None:
        """Measure the trained run, and send the result to the driver.

        Raises:
            EnvironmentFault: the driver requested a stop. There is nothing to save, and the error also ends the workers
                that wait for this one.
        """

        def on_images(done: int, total: int) -> None:
            if self.reporter.requested() == Request.STOP:
                raise EnvironmentFault("the evaluation was stopped")
            self.reporter.progress(Evaluating(self.rank, done, total))

        self.reporter.enter(EVALUATION)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the training held
        step, networks = self.packaged()
        evaluated = evaluate_trained(self.config, self.images, step, networks, self.device, on_images)
        if evaluated is not None:
            self.reporter.send(evaluated)

    def packaged(self) -> tuple[int, Mapping[str, State]]:
        """Step and networks of the checkpoint that the model is made of."""
        if self.config.checkpoint.use == LAST:
            return self.saved.position.serial, self.saved.networks
        step = self.agreed(find_step(self.store, self.config.checkpoint.use) if self.rank == 0 else -1)
        return step, load(self.store, step, self.images.index, len(self.images)).networks

    def train(self, name: str, stage: Stage, following: str) -> None:
        """Train the remaining steps of a stage, and save after the last one."""
        position, meter, stop, measures = self.saved.position, self.meter_of(stage), False, False
        window = Meter(meter.flops, meter.peak)
        for network in stage.lazy_state():
            self.saved.networks.pop(network, None)  # the stage holds it; do not keep a second copy
        for step in stage.steps(position.epoch, position.step, self.control.write):
            self.reporter.enter(name)
            signals = self.control.read(step.piggyback_K)
            for counter in (meter, window):
                counter.add(step.loss, len(step.rows_B) * self.world)
            self.report(name, step, meter)
            if not step.resumable:
                if signals.stop:
                    self.save(stage.lazy_state(), stop=True)  # the epoch is repeated from its beginning
                continue
            self.advance(position, step)
            if position.serial % self.config.tracking.every_steps == 0:
                window = self.report_steps(name, window)
            measures = step.ends_epoch and not signals.stop and self.interim.due(self.infos[name], step.epoch + 1)
            if step.ends_epoch:
                self.end_epoch(name, stage, step, meter)
                meter = Meter(meter.flops, meter.peak)
                if step.epoch + 1 == self.infos[name].epochs:
                    stop = signals.ends(saving=True) and following != DONE
                    continue  # saved below
            if measures:
                self.save_and_measure(name, step.epoch + 1, stage.state(), stop=signals.move)
                meter, window = (Meter(meter.flops, meter.peak) for _ in range(2))  # the next epoch begins here
            elif saving := signals.save or signals.stop or self.epoch_due(position):
                self.save(stage.lazy_state(), stop=signals.ends(saving))
        self.saved.networks |= stage.state()
        # a new serial: a checkpoint of the last step may exist already, and would not be replaced
        self.saved.position = Position(following, serial=position.serial + 1)
        if measures:
            self.save_and_measure(name, self.infos[name].epochs, {}, stop)
        else:
            self.save(stop=stop)

    def meter_of(self, stage: Stage) -> Meter:
        peak = peak_of(self.device, self.config.engine)
        return Meter(stage.image_flops() if peak else 0, peak and peak * self.world)

    def advance(self, position: Position, step: StageStep) -> None:
        """Move the position past a step."""
        behind = (step.epoch + 1, 0) if step.ends_epoch else (step.epoch, step.step + 1)
        (position.epoch, position.step), position.serial = behind, position.serial + 1

    # Reporting -------------------------------------------------------------------------------

    def report(self, name: str, step: StageStep, meter: Meter) -> None:
        if not step.applied:
            self.reporter.send(BadStep(self.rank, step.epoch, step.step, list(step.rows_B)))
        if self.rank == 0 and step.warning:
            self.reporter.send(Warned(name, step.warning))
        if self.rank == 0 and step.step < step.steps:
            self.reporter.progress(Progress(name, step.epoch, step.step, step.steps, step.loss, meter.speed()))

    def report_steps(self, name: str, window: Meter) -> Meter:
        """Report the numbers of a window of steps, if their losses are known; returns the next window."""
        if self.rank == 0 and window.steps:
            numbers = {"loss": window.loss()} | window.speed()
            self.reporter.send(StepsDone(name, self.saved.position.serial, numbers))
        return Meter(window.flops, window.peak)

    def end_epoch(self, name: str, stage: Stage, step: StageStep, meter: Meter) -> None:
        if self.rank == 0:
            measured = {"loss": meter.loss(), "seconds": meter.seconds(), "steps": float(step.steps)}
            numbers = measured | dict(step.facts) | meter.speed()
            self.reporter.send(EpochDone(name, step.epoch + 1, self.saved.position.serial, numbers))
        if step.epoch + 1 == self.infos[name].epochs or (step.epoch + 1) % stage.preview_every == 0:
            pictures = stage.previews()
            if pictures:
                serial = self.saved.position.serial
                self.reporter.send(Preview(name, step.epoch + 1, serial, self.rank, self.world, pictures))

    # Saving and resuming ---------------------------------------------------------------------

    def save_due(self) -> bool:
        """Whether a checkpoint is due by the clock; only rank 0 checks."""
        minutes = (monotonic() - self.saved_at) / 60
        return self.rank == 0 and minutes >= self.config.checkpoint.every_minutes

    def epoch_due(self, position: Position) -> bool:
        every = self.config.checkpoint.every_epochs
        return every is not None and position.step == 0 and position.epoch % every == 0

    def save(
        self,
        training: Mapping[str, State] = MappingProxyType({}),
        stop: bool = False,
        score: Callable[[], Best | None] = no_score,
    ) -> None:
        """Start a checkpoint of the current position, on every worker; with `stop`, finish it and stop.

        Args:
            training: states of the networks that are in training; `saved` holds those of all others.
            score: waits for what the checkpoint measured, if it is the best.
        """
        began = monotonic()
        self.reporter.enter("saving")
        saved = Saved(self.saved.position, {**self.saved.networks, **training})
        self.writer.save(
            saved.position.serial,
            tensors=saved.files(),
            latents=self.latents,
            state=saved.state(self.images.index, len(self.images), self.config, self.loss_weights),
            score=score,
        )
        if stop:
            self.writer.wait()
            raise Stopped
        self.saved_at = monotonic()
        if self.rank == 0:
            self.reporter.send(CheckpointStarted(self.saved_at - began))

    def save_and_measure(self, stage: str, epoch: int, training: Mapping[str, State], stop: bool = False) -> None:
        """Save, and measure what is saved: a loss meanwhile costs the measurement, and no more than at other times.

        Args:
            epoch: epochs of the stage so far. stop: whether to stop then.
        """
        measured: Future[Callable[[], Best | None]] = Future()
        self.save(training, score=lambda: measured.result()())
        began, score = monotonic(), no_score
        try:
            compare = self.interim.measure({**self.saved.networks, **training}, self.latents, self.goes_on)
            if compare is not None:
                score = partial(self.judge, compare, stage, epoch, self.saved.position.serial, monotonic() - began)
        finally:
            measured.set_result(score)
        if stop:
            self.writer.wait()
            raise Stopped

    def judge(
        self, compare: Callable[[], list[Result]], stage: str, epoch: int, serial: int, seconds: float
    ) -> Best | None:
        """Compare and report what a checkpoint measured, in the writer's thread of rank 0; it, if it is the best."""
        results, before = compare(), self.best_so_far(stage)
        found = self.interim.best_of(results, stage, epoch, serial)
        better = found if found is not None and found.beats(before) else None
        self.reporter.post(Measured(stage, epoch, serial, by_key(results), found, better or before, seconds))
        return better

    def best_so_far(self, stage: str) -> Best | None:
        """The best checkpoint; None if there is none, or it is lost, which is reported."""
        try:
            return usable_best(self.store)
        except layout.DamagedCheckpoint as error:
            self.reporter.post(Warned(stage, f"{error}; the best is chosen among those that are measured from now on"))
            return None

    def goes_on(self, phase: str) -> bool:
        """Enter a phase, unless a stop was requested; the same on all workers. Collective."""
        self.reporter.enter(phase)
        return self.first(self.reporter.requested() == Request.STOP) is None

    def resume(self) -> Saved:
        """Contents of the newest readable checkpoint, or the initial state. Damaged ones are skipped and reported."""
        steps, faults = iter(self.usable() if self.rank == 0 else ()), dict[int, str]()
        finders: dict[int, int] = {}  # by step: the lowest rank that found it damaged
        while (serial := self.agreed(next(steps, -1))) >= 0:
            try:
                counters_only = self.rank > 0  # a thousand workers would read the same networks a thousand times
                saved = load(self.store, serial, self.images.index, len(self.images), self.loss_weights, counters_only)
                restore_rows(self.store, serial, self.latents, saved.position)
            except layout.DamagedCheckpoint as error:
                faults[serial] = str(error)
            if (finder := self.first(serial in faults)) is None:
                for step in (step for step, finder in finders.items() if finder == self.rank):
                    layout.mark_damaged(self.store, step, faults[step])  # safe to mark: an older one is good
                    self.reporter.send(CheckpointDamaged(step, faults[step]))
                if self.rank == 0:
                    self.reporter.send(Resumed(saved.position))
                    self.best_so_far(saved.position.stage)  # reports one that is lost
                saved.networks = share_networks(saved.networks, self.device)
                return saved
            finders[serial] = finder
        if finders:
            raise retention.none_left(self.store, faults or {0: f"worker {finder} found them damaged"})
        return Saved(Position(next(iter(self.infos))))

    def usable(self) -> list[int]:
        """Steps that may be resumed from, newest first; those found damaged by their manifest are reported."""
        steps, damaged = retention.usable(self.store)
        for step, reason in damaged.items():
            self.reporter.send(CheckpointDamaged(step, reason))
        return steps

    def first(self, flag: bool) -> int | None:
        """The lowest rank on which the flag is true; None if on none."""
        lowest = torch.tensor(self.rank if flag else self.world, device=self.device)
        if self.world > 1:
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return int(lowest) if lowest < self.world else None

    def agreed(self, number: int) -> int:
        """Rank 0's number, on every worker."""
        if self.world == 1:
            return number
        shared = torch.tensor(number, device=self.device)
        dist.broadcast(shared, 0)
        return int(shared)
