"""Stage 1 of IMLE in the space of images: every training image pulls the nearest generated one (Li & Malik 2018).

An epoch makes images of fresh codes of the prior. Each training image takes the code of the nearest of them, and G is
trained to make the image of that code. The codes that were taken are the rows of the latent table: a run is resumed
within an epoch, and pairs can be shown and measured as those of GLO.

Shapes: B rows of a batch, n rows of this worker, m candidates of this worker, M of all, D latent dimension, P numbers
of a compared image, K numbers of a piggyback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..cluster.neighbours import ring_nearest
from ..cluster.placement import Share, ranges
from ..config.run import Config
from ..models.comm import all_sum, rank, world_size
from ..models.generators import generator_of
from ..models.noise import Stream, noise
from ..models.patches import patch_seeds
from .engine.build import build_engine
from .engine.optimizer import OptimizerConfig
from .glo import GENERATOR
from .objective import Objective
from .passes import Played, Turn, rows_in_order, train_passes
from .plan.costs import model_flops, training_costs
from .previews import Pictures, Previews
from .prior import prior_of
from .stage import Stage, StageContext, StageCost, StageInfo, StageStep, State


class Pixels(Stage):
    """The generator of one worker, and what its images are compared with."""

    def __init__(self, context: StageContext, networks: Mapping[str, State]) -> None:
        config, keys = context.config, context.config.pixels
        self.context, self.preview_every = context, config.preview.every_epochs
        torch.manual_seed(config.seed)
        optimizer = OptimizerConfig(keys.lr, keys.betas)
        self.generator = build_engine(
            generator_of(config), optimizer, config.engine, config.batch_size, context.device, networks.get(GENERATOR)
        )
        self.loss = Objective(config, context.device)
        self.prior = prior_of(config).to(context.device)
        self.drawing = Previews(config, context.images, context.latents.rows, context.device)
        self.image_nP: Tensor | None = None
        self.distances: dict[str, float] = {}

    @classmethod
    def info(cls, config: Config) -> StageInfo:
        return StageInfo("pixels", "IMLE on pixels", config.pixels.epochs)

    @classmethod
    def cost(cls, config: Config, rows: int) -> StageCost:
        keys, (generator, loss) = config.pixels, training_costs(config)
        number = candidates(config, rows)
        search = 2.0 * rows * number * compared_numbers(config)
        drawn = float(generator.forward_flops) * number
        steps = keys.epochs * math.ceil(rows / keys.batch_size)
        return StageCost(steps, keys.epochs * (float(generator.flops + loss.flops) * rows + drawn + search))

    def steps(self, epoch: int, step: int, piggyback: Callable[[], Tensor]) -> Iterator[StageStep]:
        config, images = self.context.config, self.context.images
        self.context.enter("pixels")
        yield from train_passes(config, config.pixels, images, self.play, (epoch, step), piggyback, "pixels.lr")

    def play(self, turn: Turn, piggyback_K: Tensor) -> Played:
        """Update the generator by a batch of pairs; the first batch of an epoch is preceded by the search for them."""
        config, batch, device = self.context.config, turn.batch, self.context.device
        if batch.step == 0:
            self.context.enter("search")
            self.match(turn.epoch)
            self.context.enter("pixels")
        img_BCHW = batch.img_BCHW.to(device, non_blocking=True).float() / 255
        seed_B = patch_seeds(config.seed, turn.epoch, batch.rows_B)
        result = self.generator.step(
            self.context.latents.gather(batch.rows_B.numpy()).to(device),
            batch.weight_B.to(device, non_blocking=True),
            lambda fake_BCHW, part: self.loss(fake_BCHW, img_BCHW[part], seed_B[part]),
            config.pixels.lr * turn.scale,
            piggyback_K,
        )
        return Played(result.loss, result.applied, result.piggyback_K, self.distances)

    @torch.no_grad()
    def match(self, epoch: int) -> None:
        """Give each own row the code whose image is nearest to its own among those of all workers. Collective.

        G is in eval mode, so that a candidate does not depend on its batch mates.
        """
        config, latents, device = self.context.config, self.context.latents, self.context.device
        network = generator_of(config)
        network.load_state_dict(self.generator.weights())  # every worker holds a part
        network.to(device).eval()
        mine = ranges(candidates(config, len(self.context.images)), world_size())[rank()]
        size = Share(config.batch_size, rank(), world_size()).size
        block_mP = torch.empty(len(mine), compared_numbers(config), device=device)
        for start in range(0, len(mine), size):
            index_B = torch.arange(mine.start + start, min(mine.start + start + size, mine.stop))
            block_mP[start : start + size] = compared(config, network(self.codes(epoch, index_B)))
        index_n, distance_n = ring_nearest(self.own_images(), block_mP)
        latents.replace(list(latents.rows), self.codes(epoch, index_n))
        latents.flush()
        total = float(all_sum(distance_n.sum().to(device)))
        self.distances = {"distance": total / len(self.context.images)}

    def codes(self, epoch: int, index_B: Tensor) -> Tensor:
        """Codes of the prior by number, [B, D]."""
        config, device = self.context.config, self.context.device
        e_BD = noise(config.seed, epoch, index_B, self.prior.noise_dim, device, Stream.CANDIDATES)
        z_BD: Tensor = self.prior(e_BD)
        return z_BD

    def own_images(self) -> Tensor:
        """The images of this worker's rows as they are compared, [n, P]; read once."""
        if self.image_nP is None:
            context = self.context
            read = rows_in_order(context.config, context.images, context.latents.rows)
            parts = [compared(context.config, batch.img_BCHW.float() / 255) for batch in read]
            self.image_nP = torch.cat(parts).to(context.device)
        return self.image_nP

    def lazy_state(self) -> dict[str, State]:
        return {GENERATOR: self.generator.lazy_state()}

    def state(self) -> dict[str, State]:
        return {GENERATOR: self.generator.state()}

    def previews(self) -> Pictures:
        return self.drawing.reconstructed(self.generator.weights(), self.context.latents)

    def image_flops(self) -> int:
        return model_flops(self.context.config)


def candidates(config: Config, rows: int) -> int:
    """M, the images that an epoch makes for `rows` training images."""
    return max(1, round(config.pixels.candidates * rows))


def compared_numbers(config: Config) -> int:
    """P, the numbers of an image as it is compared."""
    return config.data.channels * min(config.pixels.side, config.data.resolution) ** 2


def compared(config: Config, img_BCHW: Tensor) -> Tensor:
    """Images as they are compared, [B, P]: averaged down where they are larger than `pixels.side`."""
    side = min(config.pixels.side, config.data.resolution)
    return adaptive_avg_pool2d(img_BCHW.float(), side).flatten(1)


STAGE = Pixels
