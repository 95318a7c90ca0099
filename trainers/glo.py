"""Stage 1 (GLO): the generator and one latent code per image, by reconstruction.

Shapes: B rows of this worker's batch, D latent dimension, n rows of this worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..cluster.latents import LatentTable
from ..cluster.placement import Share, epoch_plan, steps_left
from ..config.run import Config
from ..config.schedule import factor
from ..datasets.loader import BadRows, PlannedBatch, batches
from ..datasets.reader import ImageRows
from ..errors import UserError
from ..models.patches import patch_seeds
from .engine.step import Engine


@dataclass(frozen=True)
class GloStep:
    """What one step did. `rows_B`: this worker's real rows; `votes`: see `StepResult`."""

    epoch: int
    step: int
    steps: int
    loss: float
    rows_B: list[int]
    applied: bool
    votes: float
    latent_lr: float


def train_glo(
    config: Config,
    images: ImageRows,
    latents: LatentTable,
    engine: Engine,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: tuple[int, int],
    vote: Callable[[], float],
) -> Iterator[GloStep]:
    """Stage 1, Eq. 3 of the paper: fit the generator and the codes of this worker's rows.

    Yields after every step; the caller decides what to log, when to save and whether to go on.
    An epoch that was begun before a restart goes on with the rows that it has not visited.

    Args:
        start: (epoch, step) of the first step to take.
        loss: (fake [B, C, H, W], real [B, C, H, W], patch seed per row) -> loss per row.
        vote: asked once a step, e.g. whether a checkpoint is due here.
    Raises:
        UserError: `glo.max_bad_steps` steps in a row were not finite.
    """
    bad_rows, bad_in_a_row = BadRows(config.data.max_bad_fraction, len(latents.rows)), 0
    for epoch in range(start[0], config.glo.epochs):
        first_step = start[1] if epoch == start[0] else 0
        plan = plan_epoch(config, epoch, first_step, latents, engine)
        steps = first_step + len(plan)
        for planned in plan[:2]:
            latents.prefetch(planned.rows_B)
        after_next = [*plan[2:], None, None][: len(plan)]
        stream = batches(images, plan, threads=config.data.threads, prefetch=config.data.prefetch, max_bad=bad_rows)
        for planned, ahead, batch in zip(plan, after_next, stream, strict=True):
            z_BD = latents.gather(planned.rows_B).to(engine.device)
            img_BCHW = batch.img_BCHW.to(engine.device, non_blocking=True).float() / 255
            weight_B = batch.weight_B.to(engine.device, non_blocking=True)
            seed_B = patch_seeds(config.seed, epoch, batch.rows_B)
            scale = factor(config.glo.schedule, epoch + batch.step / steps, config.glo.epochs)

            result = engine.step(
                z_BD,
                weight_B,
                lambda fake, part: loss(fake, img_BCHW[part], seed_B[part]),  # noqa: B023
                config.glo.generator_lr * scale,
                vote(),
            )

            rows_B = batch.rows_B[batch.weight_B > 0].numpy()
            unread_B = planned.rows_B[(planned.weight_B > 0) & (batch.weight_B.numpy() == 0)]
            if result.applied:
                grad_BD = result.grad_BD[weight_B > 0].cpu()
                ahead_B = ahead and ahead.rows_B  # gathered by the same call, and here when its step begins
                latents.apply(epoch, batch.step, rows_B, grad_BD, config.glo.latent_lr * scale, unread_B, ahead_B)
            else:
                latents.skip(epoch, batch.step, planned.rows_B[planned.weight_B > 0])
            bad_in_a_row = 0 if result.applied else bad_in_a_row + 1
            yield GloStep(
                epoch,
                batch.step,
                steps,
                result.loss,
                rows_B.tolist(),
                result.applied,
                result.votes,
                config.glo.latent_lr * scale,
            )
            if bad_in_a_row >= config.glo.max_bad_steps:
                raise UserError(
                    f"loss or gradients were not finite for {bad_in_a_row} steps in a row, up to epoch {epoch} step "
                    f"{batch.step} (rows here {rows_B.tolist()[:8]}...); lower glo.latent_lr and glo.generator_lr, "
                    "or set engine.precision=fp32"
                )
        latents.flush()  # the next epoch may begin with rows of this one's last step


def plan_epoch(config: Config, epoch: int, first_step: int, latents: LatentTable, engine: Engine) -> list[PlannedBatch]:
    """What is left of `epoch` for this worker, in as many steps as the busiest worker needs."""
    visited_n = latents.visits()
    rank = dist.get_rank() if engine.world > 1 else 0
    share = Share(config.glo.batch_size, rank, engine.world, config.engine.accumulation)
    steps = torch.tensor(steps_left(epoch, share, visited_n, first_step))
    if engine.world > 1:
        steps = steps.to(engine.device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
    return epoch_plan(config.seed, epoch, latents.rows, share, int(steps), visited_n, first_step)
