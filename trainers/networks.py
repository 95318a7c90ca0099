"""The stage of generators that are trained against critics, by every objective; from scratch, or from a decoder.

Shapes: K numbers of a piggyback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..cluster.placement import Share
from ..config.methods import refines
from ..config.run import Config
from ..datasets.reader import ImageRows
from ..models.comm import rank, world_size
from ..models.critics import Critic, critic_of
from .engine.build import build_engine
from .engine.optimizer import OptimizerConfig
from .engine.step import Engine
from .glo import GENERATOR, averaged_statistics
from .labelled import HeldOut
from .passes import Played, Turn, train_passes
from .plan.costs import adversarial_flops
from .previews import Pictures, Previews
from .prior import prior_codes, referenced_generator
from .refinement import Refinement, warm_start
from .rounds import Game, Player, facts_of
from .stage import Stage, StageContext, StageCost, StageInfo, StageStep, State

CRITIC = "critic"  # network name
STATISTICS_OF = 16384  # codes that the averaged generator's BatchNorm is measured with


class Networks(Stage):
    """A generator and its critic on one worker, each with an engine of its own."""

    def __init__(self, context: StageContext, networks: Mapping[str, State]) -> None:
        config, keys = context.config, context.config.networks
        self.context, self.preview_every = context, config.preview.every_epochs
        optimizer = partial(OptimizerConfig, betas=keys.betas, kind=keys.optimizer, history=keys.history)
        drawn, trained = optimizer(keys.rate_of_generator, ema=keys.ema), networks.get(GENERATOR)
        torch.manual_seed(config.seed)
        network = referenced_generator(config)
        self.refinement = Refinement.of(context, networks) if refines(config.method) else None
        if self.refinement is not None and CRITIC not in networks:
            network, trained = warm_start(config, networks), None  # with an optimiser of its own
        self.generator = self.engine(network, drawn, trained, config.engine.zero)
        torch.manual_seed(config.seed + 2)
        judging = optimizer(keys.critic.lr, clip=keys.critic.clip)
        state = networks.get(CRITIC)
        # its network is also called outside of DeepSpeed, which ZeRO 3 would have taken apart
        self.critic = Player.resumed(self.engine(critic_of(config), judging, state, min(config.engine.zero, 2)), state)
        self.unseen = HeldOut.of(config, context.images)
        self.drawing = Previews(config, context.images, context.latents.rows, context.device)

    def engine(self, network: nn.Module, optimizer: OptimizerConfig, state: State | None, zero: int) -> Engine:
        config = self.context.config
        settings = config.engine.model_copy(update={"zero": zero})
        return build_engine(network, optimizer, settings, config.networks.batch_size, self.context.device, state)

    @classmethod
    def info(cls, config: Config) -> StageInfo:
        return StageInfo("networks", "Refinement" if refines(config.method) else "GAN", config.networks.epochs)

    @classmethod
    def cost(cls, config: Config, rows: int) -> StageCost:
        keys = config.networks
        steps = keys.epochs * math.ceil(rows / keys.batch_size)
        return StageCost(steps, float(adversarial_flops(config)) * rows * keys.epochs)

    def steps(self, epoch: int, step: int, piggyback: Callable[[], Tensor]) -> Iterator[StageStep]:
        context = self.context
        context.enter("networks")
        game = Game.of(context.config, context.images, self.generator, self.refinement)
        steps = train_networks(context.images, game, {CRITIC: self.critic}, (epoch, step), piggyback)
        critic = cast(Critic, self.critic.engine.network)
        yield from self.unseen.measured(steps, critic, context.device) if self.unseen else steps

    def lazy_state(self) -> dict[str, State]:
        return {GENERATOR: self.generator.lazy_state(), CRITIC: self.critic.saved(self.critic.engine.lazy_state())}

    def state(self) -> dict[str, State]:
        config, generator = self.context.config, self.generator.state()
        if "ema" in generator and config.generator.normalises:
            batch = Share(config.networks.batch_size, rank(), world_size()).size
            codes = prior_codes(config, min(len(self.context.images), STATISTICS_OF))
            codes = codes if self.refinement is None else self.context.latents.codes()
            generator["ema"] |= averaged_statistics(config, generator, codes, batch, self.context.device)
        return {GENERATOR: generator, CRITIC: self.critic.saved(self.critic.engine.state())}

    def previews(self) -> Pictures:
        sampler = {} if self.refinement is None else self.refinement.sampler.state_dict()
        return self.drawing.sampled(self.generator.weights(), sampler)  # every worker holds a part

    def image_flops(self) -> int:
        return adversarial_flops(self.context.config)


def train_networks(
    images: ImageRows,
    game: Game,
    critics: Mapping[str, Player],
    start: tuple[int, int],
    piggyback: Callable[[], Tensor],
) -> Iterator[StageStep]:
    """Train a generator against critics; yields after every batch, with which each critic is updated.

    The generator is updated after every `networks.critic.steps` batches. Batches do not depend on the number of
    workers, and a position alone says where to resume.

    Args:
        game: what all batches have in common, with the generator.
        start: (epoch, step) of the first step to take.
        piggyback: called once per step for numbers [K] whose sum over workers is returned with the step.
    Raises:
        UserError: `networks.max_bad_steps` steps in a row were not finite.
    """
    config, keys = game.config, game.config.networks

    def play(turn: Turn, carried_K: Tensor) -> Played:
        now = game.round(turn.epoch, turn.batch, turn.scale)
        judged, made = [now.critic_step(player, carried_K) for player in critics.values()], []
        if (turn.number + 1) % keys.critic.steps == 0:
            players = list(critics.values())
            made = [now.generator_step(players, draw) for draw in range(1, 1 + keys.generator_steps)]
        applied = all([*(one.applied for one in judged), *(one.applied for one in made)])
        return Played(judged[0].loss, applied, judged[0].piggyback_K, facts_of(judged, made))

    rates = "networks.generator_lr and networks.critic.lr"
    yield from train_passes(config, keys, images, play, start, piggyback, rates)


STAGE = Networks
