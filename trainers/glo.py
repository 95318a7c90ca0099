"""Stage 1 (GLO): training of the generator and one latent code per image by reconstruction.

Shapes: B rows of this worker's batch, D latent dimension, n rows of this worker, K numbers of a piggyback.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..cluster.latent_rates import latent_lr
from ..cluster.latents import LatentTable
from ..cluster.placement import Share, epoch_plan, even_batch, rows_left
from ..config.run import Config
from ..datasets.loader import BadRows, Batch, PlannedBatch, batches
from ..datasets.reader import ImageRows
from ..models.comm import gather, rank
from ..models.generators import generator_of
from ..models.noise import Stream, noise
from ..models.patches import patch_seeds
from ..models.sphere import project
from ..models.statistics import set_exact_statistics
from .bad_steps import BadSteps
from .code_space import CodeSpace
from .engine.build import build_engine
from .engine.optimizer import OptimizerConfig
from .engine.step import Engine, StepResult
from .feature_cache import FeatureCache
from .objective import Objective
from .plan.costs import model_flops, training_costs
from .previews import Pictures, Previews
from .stage import Stage, StageContext, StageCost, StageInfo, StageStep, State, final_weights

GENERATOR = "generator"  # network name
IN_FLIGHT = {"cuda": 1}  # steps queued behind the one whose result is read, by type of device; a CPU queues none


class Glo(Stage):
    """GLO on one worker: the generator's engine, the loss, and this worker's shard of the latent table."""

    def __init__(self, context: StageContext, networks: Mapping[str, State]) -> None:
        config = context.config
        self.context, self.preview_every = context, config.preview.every_epochs
        torch.manual_seed(config.seed)
        network = generator_of(config)
        optimizer = OptimizerConfig(config.glo.generator_lr, config.glo.betas, config.glo.ema)
        state = networks.get(GENERATOR)
        self.engine = build_engine(network, optimizer, config.engine, config.glo.batch_size, context.device, state)
        self.loss = objective = Objective(config, context.device)
        self.features = None
        if config.loss.cache_features:
            self.features = FeatureCache(config, context.latents.rows, context.device, objective.real_maps)
        self.drawing = Previews(config, context.images, context.latents.rows, context.device)

    @classmethod
    def info(cls, config: Config) -> StageInfo:
        return StageInfo("glo", "GLO", config.glo.epochs)

    @classmethod
    def cost(cls, config: Config, rows: int) -> StageCost:
        flops = sum(part.flops for part in training_costs(config))
        steps = config.glo.epochs * math.ceil(rows / config.glo.batch_size)
        return StageCost(steps, float(flops) * rows * config.glo.epochs)

    def steps(self, epoch: int, step: int, piggyback: Callable[[], Tensor]) -> Iterator[StageStep]:
        context = self.context
        context.enter("glo")
        yield from train_glo(
            context.config,
            context.images,
            context.latents,
            self.engine,
            self.loss,
            (epoch, step),
            piggyback,
            IN_FLIGHT.get(context.device.type, 0),
            self.features,
        )

    def lazy_state(self) -> dict[str, State]:
        return {GENERATOR: self.engine.lazy_state()}

    def state(self) -> dict[str, State]:
        state = self.engine.state()
        if "ema" in state and self.context.config.generator.normalises:
            batch = Share(self.context.config.glo.batch_size, rank(), self.engine.world).size
            codes, device = self.context.latents.codes(), self.context.device
            state["ema"] |= averaged_statistics(self.context.config, state, codes, batch, device)
        return {GENERATOR: state}

    def previews(self) -> Pictures:
        weights = self.engine.weights()  # every worker holds a part
        return self.drawing.reconstructed(weights, self.context.latents)

    def image_flops(self) -> int:
        return model_flops(self.context.config)


def averaged_statistics(
    config: Config, state: State, codes_nD: Tensor, batch: int, device: torch.device
) -> dict[str, Tensor]:
    """Buffers of the averaged generator: exact statistics of its BatchNorm over the codes of all workers. Collective.

    The running ones are those of the raw weights. Nothing else of the state changes, so a run that is killed before it
    is saved comes to the same numbers again.

    Args:
        batch: codes that pass at a time.
    """
    network = generator_of(config)
    network.load_state_dict(final_weights(state))
    set_exact_statistics(network.to(device), codes_nD.to(device), batch)
    return {name: buffer.cpu() for name, buffer in network.named_buffers()}


def train_glo(
    config: Config,
    images: ImageRows,
    latents: LatentTable,
    engine: Engine,
    loss: Callable[..., Tensor],
    start: tuple[int, int],
    piggyback: Callable[[], Tensor],
    in_flight: int = 0,
    features: FeatureCache | None = None,
) -> Iterator[StageStep]:
    """Stage 1, Eq. 3 of the paper: fit the generator and the codes of this worker's rows.

    Yields after every step; logging, saving and stopping are up to the caller.
    An epoch that was interrupted is resumed with the rows that it has not visited.

    A step's result is read after `in_flight` further steps were queued, so that the device never waits for the host. No
    row is visited twice in an epoch, so the numbers are the same. A yielded step that others are in flight behind has a
    piggyback of 0, and must not be saved; once a piggyback is not 0, and at the end of an epoch, there are none.

    Args:
        start: (epoch, step) of the first step to take.
        loss: (fake, real [B, C, H, W], patch seed per row, and with `features` the real maps) -> loss per row.
        piggyback: called once per step for numbers [K], not negative, whose sum over workers is returned with the step,
            or with a later one.
        in_flight: the same on all workers.
    Raises:
        UserError: `glo.max_bad_steps` steps in a row were not finite.
    """
    bad_rows = BadRows(config.data.max_bad_fraction, len(latents.rows))
    bad_steps = BadSteps(config.glo.max_bad_steps, "glo.latent_lr and glo.generator_lr")
    code_space = CodeSpace(config, images, latents, engine.device)
    for epoch in range(start[0], config.glo.epochs):
        first_step = start[1] if epoch == start[0] else 0
        plan = plan_epoch(config, len(images), epoch, first_step, latents, engine)
        steps = first_step + len(plan)
        read = with_images(config, images, latents, plan, bad_rows, 2 + in_flight)
        queued = (launch(config, latents, engine, loss, (epoch, steps), *one, piggyback(), features) for one in read)
        for step, result in in_order(queued, in_flight):
            scale = config.glo.schedule.factor(epoch + step.batch.step / steps, config.glo.epochs)
            code_lr = latent_lr(config.glo, len(images)) * scale
            rows_B = visit(latents, epoch, steps, code_lr, step, result)
            ends_epoch = step.batch.step + 1 == steps
            measures, warning = code_space.at_the_end_of(epoch) if ends_epoch else ({}, "")
            done = StageStep(
                epoch,
                step.batch.step,
                steps,
                result.piggyback_K,
                loss=result.loss,
                rows_B=rows_B,
                applied=result.applied or result.loss is None,
                facts={"latent_lr": code_lr} | measures,
                ends_epoch=ends_epoch,
                warning=warning,
            )
            yield done
            bad_steps.count(done)
        latents.flush()  # the next epoch may begin with rows of this one's last step


def in_order(queued: Iterator[Launched], in_flight: int) -> Iterator[tuple[Launched, StepResult]]:
    """Results of steps that are queued as the iterator advances; each is read after `in_flight` further ones.

    Once a piggyback is not 0, what is queued is read before more is. It is returned with the last of them, and 0 with
    those before.
    """
    waiting: deque[Launched] = deque()
    carried_K = torch.zeros(0)

    def read() -> tuple[Launched, StepResult]:
        nonlocal carried_K
        step = waiting.popleft()
        result = step.result()
        sum_K = result.piggyback_K + (carried_K if len(carried_K) else 0)
        carried_K = sum_K if waiting else torch.zeros(0)
        return step, replace(result, piggyback_K=torch.zeros_like(sum_K) if waiting else sum_K)

    for step in queued:
        waiting.append(step)
        while waiting and (len(waiting) > in_flight or carried_K.any()):
            yield read()
    while waiting:
        yield read()


def with_images(
    config: Config, images: ImageRows, latents: LatentTable, plan: list[PlannedBatch], bad_rows: BadRows, depth: int
) -> Iterator[tuple[PlannedBatch, PlannedBatch | None, Batch]]:
    """Batches of an epoch, the batch `depth` steps after each, and its images, decoded ahead.

    Args:
        depth: batches whose codes are asked for before their step begins.
    """
    for planned in plan[:depth]:
        latents.prefetch(planned.rows_B)
    later = [*plan[depth:], *[None] * depth][: len(plan)]
    threads, prefetch, pinned = config.data.threads, config.data.prefetch, torch.cuda.is_available()
    stream = batches(images, plan, threads=threads, prefetch=prefetch, max_bad=bad_rows, pinned=pinned)
    yield from zip(plan, later, stream, strict=True)


@dataclass(frozen=True)
class Launched:
    """A step whose result has not been read.

    ahead: a later batch, whose codes are gathered by the call that updates those of this one. result: waits for it.
    """

    planned: PlannedBatch
    ahead: PlannedBatch | None
    batch: Batch
    result: Callable[[], StepResult]


def launch(
    config: Config,
    latents: LatentTable,
    engine: Engine,
    loss: Callable[..., Tensor],
    at: tuple[int, int],
    planned: PlannedBatch,
    ahead: PlannedBatch | None,
    batch: Batch,
    piggyback_K: Tensor,
    features: FeatureCache | None = None,
) -> Launched:
    """Queue the step on a batch.

    Args:
        at: the epoch, and the number of its steps.
        ahead: as in `Launched`.
    """
    epoch, steps = at
    scale = config.glo.schedule.factor(epoch + batch.step / steps, config.glo.epochs)
    z_BD = engine.upload(latents.gather(planned.rows_B))
    z_BD, gradient_of_codes = disturbed(z_BD, config, epoch, planned.rows_B)
    img_BCHW = engine.upload(batch.img_BCHW).float() / 255
    constants = [img_BCHW, engine.upload(patch_seeds(config.seed, epoch, batch.rows_B))]
    if features is not None:
        constants.append(features.maps(planned.rows_B, batch.weight_B.numpy() > 0, img_BCHW))
    step = engine.launch(
        z_BD,
        engine.upload(batch.weight_B),
        lambda fake, part: loss(fake, *(constant[part] for constant in constants)),
        config.glo.generator_lr * scale,
        piggyback_K,
    )
    return Launched(planned, ahead, batch, step.fetch(gradient_of_codes(step.grad_BD)))


def disturbed(
    z_BD: Tensor, config: Config, epoch: int, rows_B: np.ndarray
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Codes with `glo.code_noise`, projected again, and the function that takes their gradient back to the codes.

    A code then stands for its surroundings: G has to map them to nearly its image, as in LORD (Gabbay & Hoshen 2020).
    The noise of a row is a function of (seed, epoch, row), so neither resuming nor the number of workers changes it.
    """
    if not config.glo.code_noise:
        return z_BD, lambda grad_BD: grad_BD
    dim = z_BD.shape[1]
    e_BD = noise(config.seed, epoch, torch.as_tensor(rows_B), dim, z_BD.device, Stream.CODES)
    own_BD = z_BD.detach().requires_grad_()
    moved_BD = project(own_BD + config.glo.code_noise / dim**0.5 * e_BD, config.glo.constraint)
    return moved_BD.detach(), lambda grad_BD: torch.autograd.grad(moved_BD, own_BD, grad_BD)[0]


def visit(
    latents: LatentTable, epoch: int, steps: int, code_lr: float, step: Launched, result: StepResult
) -> list[int]:
    """Start the visit of a batch's rows in the table; returns those whose images were read.

    Args:
        steps: steps of the epoch.
    """
    planned, batch, ahead = step.planned, step.batch, step.ahead
    read_B = batch.weight_B > 0
    rows_B = batch.rows_B[read_B].numpy()
    if result.applied:
        unread_B = planned.rows_B[(planned.weight_B > 0) & ~read_B.numpy()]
        latents.apply(
            epoch,
            batch.step,
            rows_B,
            result.grad_BD[read_B],
            code_lr,
            unread_B,
            ahead and ahead.rows_B,
            steps,
        )
    else:
        latents.skip(epoch, batch.step, planned.rows_B[planned.weight_B > 0])
    return rows_B.tolist()


def plan_epoch(
    config: Config, rows: int, epoch: int, first_step: int, latents: LatentTable, engine: Engine
) -> list[PlannedBatch]:
    """The remaining batches of `epoch` for this worker; `rows` are those of all workers."""
    visited_n = latents.visits()
    batch = even_batch(rows, config.glo.batch_size)
    share = Share(batch, rank(), engine.world, config.engine.accumulation)
    left_W = gather(torch.tensor(rows_left(epoch, visited_n), device=engine.device)).cpu().numpy()
    return epoch_plan(config.seed, epoch, latents.rows, share, left_W, visited_n, first_step)


STAGE = Glo
